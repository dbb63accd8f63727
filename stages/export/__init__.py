"""Export of `model.onnx` from any classifier, and the session that runs it."""
