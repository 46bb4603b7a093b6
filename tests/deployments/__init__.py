"""Tests of the processes of a cluster."""
