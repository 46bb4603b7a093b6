"""Tests of `deployments/gateway/services`."""
