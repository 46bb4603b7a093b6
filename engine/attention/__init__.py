"""Paged attention: one interface, a backend for each device."""
