"""Tests of `deployments/gateway/openai`."""
