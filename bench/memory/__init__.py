"""Benchmarks of remembered contexts: `python -m bench.memory`."""
