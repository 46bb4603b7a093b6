"""From text to token ids and back: tokenizer, chat template, tool calls, grammars."""
