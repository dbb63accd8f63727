"""The study of arXiv 2409.02134, "Edge AI: Evaluation of Model Compression Techniques for CNNs"."""
