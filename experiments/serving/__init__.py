"""What a teacher and its compiled forms take as files, in ONNX Runtime and in JAX."""
