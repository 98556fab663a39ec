"""Protocols, the sets on disk, the evaluation commands and their reports."""
