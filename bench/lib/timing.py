"""When each token of a run came, and the two speeds that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Timing:
    """`token_times[i][j]`: seconds from handing over all prompts to token j of stream i."""

    token_times: Sequence[Sequence[float]]

    @property
    def total_s(self) -> float:
        return max(times[-1] for times in self.token_times)

    @property
    def ttft_s(self) -> float:
        """Mean time to the first token over the streams."""
        return mean(times[0] for times in self.token_times)

    @property
    def output_tok_s(self) -> float:
        """Tokens generated per second of the whole run, prefill included."""
        return sum(map(len, self.token_times)) / self.total_s

    @property
    def decode_tok_s(self) -> float:
        """Tokens per second while every stream decodes: from the last stream's first token to the
        first stream's last one.
        """
        start = max(times[0] for times in self.token_times)
        stop = min(times[-1] for times in self.token_times)
        if stop <= start:  # the streams never ran together
            start = min(times[0] for times in self.token_times)
            stop = self.total_s
        num_tokens = sum(start < t <= stop for times in self.token_times for t in times)
        return num_tokens / (stop - start) if stop > start else 0.0


class System(Protocol):
    """Something that generates tokens greedily and goes on past end-of-sequence tokens."""

    name: str

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Timing:
        """`num_tokens` tokens after each prompt, all prompts at once."""

    def close(self) -> None:
        """Give back processes, ports and memory."""
