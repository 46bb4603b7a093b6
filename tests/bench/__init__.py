"""Tests of the benchmarks; no speed is asserted."""
