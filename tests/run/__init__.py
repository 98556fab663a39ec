"""A run's folder: its log, its states, who may write there."""
