"""Sampler: from a row of logits to a token, the same one whatever else is in the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import InvalidRequest
from engine.request import Request, SamplingParams
from engine.text.guide import Guide

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities.

    They are computed from the raw logits, before penalties, temperature and filters.
    """

    logprob: float  # of the chosen token
    alternatives: list[tuple[int, float]]  # (token id, logprob) of the most probable, best first


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """The sampled tokens, one entry for each row.

    A row in `errors` or `dead_ends` has no valid token, so that its request has to end. What the
    request of a row in `errors` has computed can't be trusted.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    errors: dict[int, str] = field(default_factory=dict)  # row -> a sentence
    dead_ends: dict[int, InvalidRequest] = field(default_factory=dict)  # row -> no token allowed


class Sampler:
    """Chooses the next tokens.

    A row that needs more than its argmax is processed by itself, as an array of one dimension, and
    its one random number is a function of (request.seed, position). So neither the rest of the
    batch nor the order of arrival can change a bit of it.
    """

    def __init__(self) -> None:
        self._histories: WeakKeyDictionary[Request, _History] = WeakKeyDictionary()

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> SamplerOutput:
        """Choose the next token of each request, for the position `request.num_tokens`.

        Args:
            logits: [num_requests, vocab_size] fp32; -inf forbids a token. A row with NaN, with
                +inf, or with -inf only is reported in `errors` and doesn't affect others.
            requests: Those of the rows.
        """
        assert logits.shape[0] == len(requests)
        peaks, best = (column.tolist() for column in logits.max(dim=-1))  # NaN is the max of a row
        output = SamplerOutput(best, [None] * len(requests))
        for row, (request, peak) in enumerate(zip(requests, peaks, strict=True)):
            params = request.sampling
            if not math.isfinite(peak):
                output.errors[row] = f"The model's logits are not finite (their maximum is {peak})."
                continue
            try:
                if request.guide is not None or params.temperature > 0 or _has_penalties(params):
                    output.token_ids[row] = self._choose(logits[row], request)
            except InvalidRequest as error:
                output.dead_ends[row] = error
                continue
            if params.logprobs is not None:
                token_id = output.token_ids[row]
                output.logprobs[row] = _logprobs(logits[row], token_id, params.logprobs)
        return output

    def _choose(self, logits: Tensor, request: Request) -> int:
        """Choose a token. Raises InvalidRequest if the request's grammar allows none."""
        if request.guide is not None:
            logits = _masked(logits, request.guide)
        if _has_penalties(request.sampling):
            logits = self._penalised(logits, request)
        if request.sampling.temperature == 0:
            return int(logits.argmax())
        return draw(logits, request.sampling, uniform(request.seed, request.num_tokens))

    def _penalised(self, logits: Tensor, request: Request) -> Tensor:
        history = self._histories.get(request)
        if history is None:
            history = self._histories[request] = _History(request, logits)
        history.update(request)
        return penalise(logits, request.sampling, history.is_seen, history.output_counts)


def draw(logits: Tensor, params: SamplingParams, u: float) -> int:
    """Draw a token by inverse CDF: temperature, then top-k, top-p of the rest, then min-p.

    Args:
        logits: [vocab_size], their maximum finite. Among equals the lower token id comes first.
        params: How to sample; its temperature is above 0.
        u: A random number in [0, 1).
    """
    ids, kept_logits = _top_k(logits, params.top_k)
    # In fp64 a tiny temperature can't become 0, and a sum over a large vocabulary stays exact
    # enough. The most probable token has the weight 1.
    with np.errstate(over="ignore"):  # far below the maximum, a tiny temperature gives -inf
        weights = np.exp((kept_logits - kept_logits.max()) / params.temperature)
    if params.top_p < 1:
        nucleus = _top_p(weights, params.top_p)
        ids, weights = ids[nucleus], weights[nucleus]
    if params.min_p > 0:
        weights *= weights >= params.min_p
    cdf = weights.cumsum()
    return int(ids[cdf.searchsorted(u * cdf[-1], side="right")])  # the first above: weight > 0


def penalise(
    logits: Tensor, params: SamplingParams, is_seen: Tensor, output_counts: Tensor
) -> Tensor:
    """Apply the penalties; returns new logits [vocab_size].

    The repetition penalty (arXiv:1909.05858) applies to the tokens of prompt and output, presence
    and frequency penalties (as OpenAI defines them) to those of the output.

    Args:
        logits: [vocab_size].
        params: The penalties.
        is_seen: [vocab_size] bool, True for the tokens of prompt and output.
        output_counts: [vocab_size], how often each token occurs in the output.
    """
    penalty = params.repetition_penalty
    if penalty != 1:
        lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(is_seen, lowered, logits)
    if params.frequency_penalty != 0:
        logits = logits - params.frequency_penalty * output_counts
    if params.presence_penalty != 0:
        logits = logits - params.presence_penalty * (output_counts > 0)
    return logits


def uniform(seed: int, position: int) -> float:
    """Return a random number in [0, 1) of 52 bits, so that u * total, rounded, stays below total.

    It is a pure function: output number `position` of SplitMix64 (Steele, Lea and Flood, 2014),
    started at the mixed seed.
    """
    state = _mix((seed + _GOLDEN) & _MASK)
    return (_mix((state + (position + 1) * _GOLDEN) & _MASK) >> 12) * 2.0**-52


_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _top_k(logits: Tensor, k: int | None) -> tuple[Ids, Floats]:
    """Return ids and logits of the k largest, descending; with no k, of all in the order of ids.

    torch.topk only finds the smallest of them, since its choice among equals is unspecified.
    """
    values = logits.cpu().numpy()
    if k is None or k >= len(values):
        return np.arange(len(values)), values.astype(np.float64)
    ids = np.flatnonzero(values >= float(logits.topk(k).values[-1]))
    order = np.argsort(-values[ids], stable=True)[:k]
    return ids[order], values[ids[order]].astype(np.float64)


def _top_p(weights: Floats, top_p: float) -> Ids:
    """Return the indices of the fewest weights that hold `top_p` of the sum, descending.

    Weights below (1 - top_p) * mean hold less than 1 - top_p together, so none of them is among
    these. Only the others are sorted.
    """
    total = weights.sum()
    above = np.flatnonzero(weights >= (1 - top_p) * total / len(weights))
    descending = above[np.argsort(-weights[above], stable=True)]
    count = weights[descending].cumsum().searchsorted(top_p * total) + 1
    return descending[:count]


def _masked(logits: Tensor, guide: Guide) -> Tensor:
    """Return logits [vocab_size] with -inf for tokens that the guide forbids.

    Raises:
        InvalidRequest: It forbids all of them.
    """
    allowed = guide.allowed()
    if allowed is None:
        return logits
    mask = np.zeros(len(logits), np.bool_)
    num_known = min(len(logits), len(allowed))  # a head may be wider than the vocabulary
    mask[:num_known] = allowed[:num_known]
    return logits.where(torch.from_numpy(mask).to(logits.device), -math.inf)


def _logprobs(logits: Tensor, token_id: int, num_alternatives: int) -> TokenLogprobs:
    logits = logits.double()
    norm = float(logits.logsumexp(0))
    top = logits.topk(min(num_alternatives, logits.shape[0]))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    best_first = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
    alternatives = [(other_id, value - norm) for other_id, value in best_first]
    return TokenLogprobs(float(logits[token_id]) - norm, alternatives)


def _has_penalties(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
    )


class _History:
    """The tokens that a request has, updated from step to step so that a context is read once."""

    def __init__(self, request: Request, logits: Tensor) -> None:
        self.is_seen = torch.zeros_like(logits, dtype=torch.bool)  # [vocab_size]
        self.is_seen[request.prompt_ids] = True
        self.output_counts = torch.zeros_like(logits)  # [vocab_size]
        self._num_counted = 0  # output tokens

    def update(self, request: Request) -> None:
        """Count the output tokens that are new since the last call."""
        new_ids = torch.tensor(
            request.output_ids[self._num_counted :],
            dtype=torch.int64,
            device=self.is_seen.device,
        )
        self.is_seen[new_ids] = True
        self.output_counts += new_ids.bincount(minlength=self.output_counts.shape[0])
        self._num_counted = len(request.output_ids)
