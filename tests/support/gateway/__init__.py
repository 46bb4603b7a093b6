"""Gateways, servers and clients for tests."""
