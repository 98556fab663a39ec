"""Benchmark sets on the disk, in the layouts people have."""
