"""Tests of whole clusters on this machine."""
