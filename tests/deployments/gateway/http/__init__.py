"""Tests of `deployments/gateway/http`."""
