"""Fixtures for the tests of the engine."""

from tests.support.engine.model_pairs import make_pair

__all__ = ["make_pair"]
