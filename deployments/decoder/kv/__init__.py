"""The decoder's KV blocks in the store: what is saved, fetched and discarded."""
