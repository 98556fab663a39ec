"""Checkpoints of any origin: read, recognised, matched to a network."""
