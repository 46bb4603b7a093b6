"""How fast prompts are computed, as measured in the steps that mostly did that."""

from __future__ import annotations

LEAST_TOKENS = 16  # a step with fewer measures what every step costs
LEAST_SHARE = 0.75  # of the step's tokens
REMEMBERED_TOKENS = 32768  # older ones weigh half


class PrefillMeter:
    """A mean over the prompt tokens computed last: long prompts slow down towards their end."""

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._seconds = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """None until a step has told."""
        return self._num_tokens / self._seconds if self._seconds > 0 else None

    def saw_step(self, num_prefill: int, num_decode: int, seconds: float) -> None:
        """A step computed so many tokens of prompts, and so many others."""
        num_tokens = num_prefill + num_decode
        if num_prefill < LEAST_TOKENS or num_prefill < LEAST_SHARE * num_tokens:
            return
        self._num_tokens += num_tokens
        self._seconds += seconds
        if self._num_tokens > REMEMBERED_TOKENS:
            self._num_tokens /= 2
            self._seconds /= 2
