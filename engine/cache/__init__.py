"""The KV cache: blocks, prefix caching, eviction."""
