"""The slower tier of KV blocks: between the engine's pools and the store in Redis."""
