"""Quantization: which layers get how many bits, and how their scales are found."""
