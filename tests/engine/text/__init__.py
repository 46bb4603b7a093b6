"""Tests of the tokenizer, the dialect and the grammars."""
