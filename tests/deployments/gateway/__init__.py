"""Tests of the gateway: gRPC, HTTP, OpenAI's dialect, keys."""
