"""Tenants: their keys, quotas, sessions and usage."""
