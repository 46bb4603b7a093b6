"""Tests of Redis and the KV store, against real servers."""
