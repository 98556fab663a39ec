"""The measurements: both ways of every part give the same."""
