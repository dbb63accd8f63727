"""Timing scripts, run by hand: `python -m benchmarks.<name>`. Their results are in `benchmarks/results`."""
