"""The configuration: values in config.py, how files and overrides are read, and the rules."""
