"""Tests: no GPU, no network, no downloaded weights."""
