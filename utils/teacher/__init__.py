"""Teachers: any published face network as it lies on disk, on the hub or in ONNX, and its features."""
