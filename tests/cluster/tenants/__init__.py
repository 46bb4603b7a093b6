"""Tests of tenants, keys, quotas, sessions and usage."""
