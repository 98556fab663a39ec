"""Weights that people have on disk: read without running code, matched strictly, in RGB order."""
