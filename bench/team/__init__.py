"""Benchmarks of a shared cluster: `python -m bench.team`."""
