"""Tests of the attention backends."""
