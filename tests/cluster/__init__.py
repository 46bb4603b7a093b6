"""Tests of the description, links, store, tenants and kernels."""
