"""Redis, and the store that keeps long contexts in it."""
