"""The Gemma 4 text decoder and its weights."""
