"""What tests send in OpenAI's dialect."""

from __future__ import annotations

from typing import Any

HELLO: Any = [{"role": "user", "content": "hello"}]
EIGHT: Any = {"model": "counter", "temperature": 0, "max_tokens": 8}
PROMPT_TOKENS = len("user:hello\nassistant:")
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}
