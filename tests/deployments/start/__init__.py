"""Tests of the start of a cluster."""
