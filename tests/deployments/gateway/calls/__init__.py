"""Tests of `deployments/gateway/calls`."""
