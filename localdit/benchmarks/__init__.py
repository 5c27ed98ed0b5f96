"""Benchmarks: ratios measured in one run, `python -m localdit.benchmarks.<name>`."""
