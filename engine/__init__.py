"""Attention-side decoding: a library that knows no Ray, no gRPC and no Redis."""
