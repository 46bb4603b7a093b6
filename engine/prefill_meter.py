"""PrefillMeter: how long prompts take to compute, fitted to the steps that did mostly that."""

from __future__ import annotations

from collections.abc import Sequence

LEAST_TOKENS = 16  # in a shorter step, what every step costs weighs too much
LEAST_SHARE = 0.75  # of prompts in the step's tokens
REMEMBERED_TOKENS = 32768  # older ones weigh half
LEAST_SPREAD = 1e-3  # of depths: at a single depth the two parts can't be separated


class PrefillMeter:
    """Estimates the seconds of a prefill: a part per token, and one per pair of positions.

    A least squares fit over recent steps of seconds = per_token * tokens + per_pair * pairs, where
    pairs (the work of attention) are the sum of the tokens' positions; neither part is negative.
    """

    def __init__(self) -> None:
        # Sums over steps: `tt` of tokens times tokens, `tp` of tokens times pairs, `s` of seconds.
        self._num_tokens = self._tt = self._tp = self._pp = self._ts = self._ps = 0.0

    def seconds(self, start: int, stop: int) -> float | None:
        """Estimate the seconds for a request's positions [start, stop); None if unknown."""
        if self._num_tokens == 0:
            return None
        per_token, per_pair = self._fit()
        return per_token * (stop - start) + per_pair * _num_pairs(start, stop)

    def record_step(
        self, chunks: Sequence[tuple[int, int]], num_decode: int, seconds: float
    ) -> None:
        """Record a step.

        Args:
            chunks: The positions [start, stop) of prompts that it computed.
            num_decode: Its other tokens.
            seconds: How long it took.
        """
        num_prefill = sum(stop - start for start, stop in chunks)
        num_tokens = num_prefill + num_decode
        if num_prefill < LEAST_TOKENS or num_prefill < LEAST_SHARE * num_tokens:
            return
        if self._num_tokens > REMEMBERED_TOKENS:
            self._num_tokens, self._tt, self._tp, self._pp, self._ts, self._ps = (
                total / 2
                for total in (self._num_tokens, self._tt, self._tp, self._pp, self._ts, self._ps)
            )
        num_pairs = sum(_num_pairs(start, stop) for start, stop in chunks)
        self._num_tokens += num_tokens
        self._tt += num_tokens * num_tokens
        self._tp += num_tokens * num_pairs
        self._pp += num_pairs * num_pairs
        self._ts += num_tokens * seconds
        self._ps += num_pairs * seconds

    def _fit(self) -> tuple[float, float]:
        """Return the seconds for a token and for a pair."""
        determinant = self._tt * self._pp - self._tp * self._tp
        if determinant > LEAST_SPREAD * self._tt * self._pp:
            per_token = (self._ts * self._pp - self._ps * self._tp) / determinant
            per_pair = (self._ps * self._tt - self._ts * self._tp) / determinant
            if per_token >= 0 and per_pair >= 0:
                return per_token, per_pair
            if per_token < 0:
                return 0.0, self._ps / self._pp
        return self._ts / self._tt, 0.0


def _num_pairs(start: int, stop: int) -> float:
    return (stop * (stop - 1) - start * (start - 1)) / 2
