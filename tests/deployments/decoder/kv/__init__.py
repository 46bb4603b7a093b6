"""Tests of the KV blocks that the decoder keeps in Redis."""
