"""What a training run leaves on the disk and says of itself."""
