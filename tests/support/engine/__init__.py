"""Tiny models, and stand-ins for the parts of the engine."""
