"""Tests of what every process does."""
