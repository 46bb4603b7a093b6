"""Tests of `briolette verify`."""
