"""Tests of the model against transformers."""
