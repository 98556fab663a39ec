"""Teachers from files, the hub and ONNX; their cached features."""
