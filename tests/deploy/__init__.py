"""Export to ONNX, its benchmark, comparing photographs."""
