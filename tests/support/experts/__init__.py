"""Tiny experts, and expert hosts in threads and processes."""
