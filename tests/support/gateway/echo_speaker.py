"""One side of a bench's conversation that repeats the last token; importable by its processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from bench.memory.conversation import Speaker, Turn


class Echo:
    """Answers with one token, and with its process id for a time."""

    def answer(self, prompt_ids: list[int], num_tokens: int) -> Turn:
        return Turn(len(prompt_ids), 0, float(os.getpid()), prompt_ids[-1:])


@contextlib.contextmanager
def open_echo() -> Iterator[Speaker]:
    yield Echo()
