"""Export: model.onnx from any artifact, and the session that runs it."""
