"""Tests of the scheduler and its policies."""
