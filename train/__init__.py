"""The three training scripts, what they share, and the tools for teachers."""
