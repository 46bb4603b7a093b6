"""Fakes, fixtures and servers that the tests share."""
