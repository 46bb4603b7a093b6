"""Tests of the decoder process."""
