"""RequestLimits: what a request may ask for, by the model, the KV cache and the token budget."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np

from cluster.errors import ContextTooLong, InvalidRequest
from cluster.spec import ModelSpec
from engine.cache.kv_cache import KVCache
from engine.spans import MediaSpan, check_spans, longest_step


@dataclass(frozen=True, slots=True)
class SpecLimits:
    """The facts of a model that the engine core needs."""

    max_model_len: int  # tokens, prompt and output together
    sliding_window: int
    vocab_size: int
    _: KW_ONLY
    eos_token_ids: tuple[int, ...] = ()
    hidden_size: int = 0  # width of media embeddings

    @staticmethod
    def from_spec(spec: ModelSpec, max_model_len: int | None = None) -> SpecLimits:
        """Read the limits from a model's spec; `max_model_len` may shorten its context."""
        longest = spec.max_position_embeddings
        return SpecLimits(
            max_model_len=min(max_model_len or longest, longest),
            sliding_window=spec.sliding_window,
            vocab_size=spec.vocab_size,
            eos_token_ids=spec.eos_token_ids,
            hidden_size=spec.hidden_size,
        )


class RequestLimits:
    """Refuses requests that can never be answered."""

    def __init__(self, spec: SpecLimits, kv: KVCache, token_budget: int) -> None:
        self._spec = spec
        self._kv = kv
        self._token_budget = token_budget  # tokens of a step

    def check_ids(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Check that there is a prompt and that every id is in the vocabulary.

        Raises:
            InvalidRequest: It isn't so.
        """
        if not prompt_ids:
            raise InvalidRequest("The prompt is empty.")
        if not all(self._are_known(token_ids) for token_ids in (prompt_ids, output_ids)):
            raise InvalidRequest(f"Token ids must be 0 to {self._spec.vocab_size - 1}.")

    def check_spans(
        self, spans: Sequence[MediaSpan], num_prompt_tokens: int
    ) -> Sequence[MediaSpan]:
        """Check spans, and that a step can hold each bidirectional one; returns them in order.

        Raises:
            InvalidRequest: A span is malformed, or too long for a step.
        """
        if not spans:
            return ()
        ordered = check_spans(spans, num_prompt_tokens, self._spec.hidden_size)
        longest, budget = longest_step(ordered), self._token_budget
        if longest > budget:
            raise InvalidRequest(
                f"A span has {longest} tokens that see each other, and a step computes at most "
                f"{budget}: use a smaller image, or raise engine.max_num_batched_tokens."
            )
        if not self._kv.can_ever_hold(num_prompt_tokens, longest):
            raise InvalidRequest(
                f"A span has {longest} tokens that see each other, more than the sliding KV cache "
                "holds at once: use a smaller image, or give the KV cache more memory."
            )
        return ordered

    def _are_known(self, token_ids: Sequence[int]) -> bool:
        try:
            ids = np.array(array("I", token_ids))  # min() and max() would take four times as long
        except OverflowError:  # negative, or far too large
            return False
        return bool((ids < self._spec.vocab_size).all())

    def max_tokens(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """Resolve max_tokens against the context and the KV cache; None: as many as fit.

        Raises:
            ContextTooLong: Prompt and max_tokens exceed them.
        """
        limit, what = self._spec.max_model_len, "the model's context"
        capacity = self._kv.max_request_tokens
        if capacity is not None and capacity < limit:
            limit, what = capacity, "the KV cache"
        left = limit - num_prompt_tokens
        if left < 1:
            raise ContextTooLong(
                f"The prompt has {num_prompt_tokens} tokens; {what} holds {limit}, "
                "and the answer needs at least one."
            )
        if max_tokens is not None and max_tokens > left:
            raise ContextTooLong(
                f"The prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}; "
                f"{what} holds {limit}, so that max_tokens can be at most {left}."
            )
        return left if max_tokens is None else max_tokens
