"""The networks: the published ones, key by key and output by output."""
