"""Teachers: any published face network (a file, the hub, ONNX), and its features on disk."""
