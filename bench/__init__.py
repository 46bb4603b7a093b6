"""Benchmarks: each prints a card for people and, as its last line, one JSON object."""
