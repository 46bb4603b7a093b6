"""Spans: embeddings that stand in a prompt where a medium does, an image or a stretch of sound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from cluster.errors import InvalidRequest


@dataclass(frozen=True, slots=True, eq=False)
class MediaSpan:
    """What a medium is to the decoder: one embedding for each of some positions in a row.

    They take the place of the prompt's tokens there, whose ids then change no number. In sliding
    layers the positions of a bidirectional span see each other, as far as the window reaches;
    global layers stay causal.
    """

    start: int  # the first position in the prompt
    embeddings: Tensor  # [num_tokens, hidden_size], as a tower's projector gives them: not scaled
    digest: bytes  # names the embeddings: equal digests of two media mean equal embeddings
    is_bidirectional: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.embeddings)

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True, eq=False)
class Overlay:
    """The part of a span that a batch computes; of a bidirectional one always the whole."""

    request: int  # its place in the batch
    row: int  # the first row of the batch
    position: int  # of that row
    embeddings: Tensor  # [num_rows, hidden_size]
    is_bidirectional: bool

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + len(self.embeddings))

    @property
    def last_position(self) -> int:
        return self.position + len(self.embeddings) - 1

    def to(self, device: torch.device | str) -> Overlay:
        return replace(self, embeddings=self.embeddings.to(device, non_blocking=True))


def overlays(
    spans: Sequence[MediaSpan], start: int, stop: int, *, request: int, row: int
) -> Iterator[Overlay]:
    """What a step that computes a request's positions [start, stop), the first one in the batch's
    `row`, has of the request's spans.
    """
    for span in spans:
        first, end = max(start, span.start), min(stop, span.stop)
        if first < end:
            embeddings = span.embeddings[first - span.start : end - span.start]
            yield Overlay(request, row + first - start, first, embeddings, span.is_bidirectional)


def uncut(spans: Sequence[MediaSpan], position: int) -> int:
    """Where a step may end instead of at `position`: before the bidirectional span that it would
    cut, whose tokens must be computed together.
    """
    for span in spans:
        if span.is_bidirectional and span.start < position < span.stop:
            return span.start
    return position


def uncut_blocks(spans: Sequence[MediaSpan], num_blocks: int, block_size: int) -> int:
    """After how many blocks, at most `num_blocks`, a request can resume and cut no span."""
    while (end := uncut(spans, num_blocks * block_size) // block_size) < num_blocks:
        num_blocks = end
    return num_blocks


def longest_step(spans: Sequence[MediaSpan]) -> int:
    """The tokens that some step has to compute together."""
    return max((span.num_tokens for span in spans if span.is_bidirectional), default=1)


def media_digests(spans: Sequence[MediaSpan], start: int, stop: int) -> bytes:
    """Names what the spans put at the positions [start, stop), for the hash of a block."""
    return b"".join(
        repr((s.start - start, s.num_tokens, s.is_bidirectional, s.digest)).encode()
        for s in spans
        if s.start < stop and start < s.stop
    )


def check_spans(
    spans: Sequence[MediaSpan], num_prompt_tokens: int, hidden_size: int
) -> list[MediaSpan]:
    """The spans in order. Raises InvalidRequest for those that no prompt of this length can have,
    or no model of this width.
    """
    ordered = sorted(spans, key=lambda span: span.start)
    for span in ordered:
        _check_embeddings(span, hidden_size)
        if span.start < 0 or span.stop > num_prompt_tokens:
            raise InvalidRequest(
                f"{_name(span)} has {span.num_tokens} tokens and doesn't lie inside the prompt, "
                f"which has {num_prompt_tokens}."
            )
    for before, span in pairwise(ordered):
        if span.start < before.stop:
            raise InvalidRequest(f"{_name(span)} overlaps the one at {before.start}.")
    return ordered


def _check_embeddings(span: MediaSpan, hidden_size: int) -> None:
    shape = tuple(span.embeddings.shape)
    if len(shape) != 2 or shape[0] == 0 or shape[1] != hidden_size:
        raise InvalidRequest(
            f"{_name(span)} has embeddings of the shape {shape}; this model takes at least one "
            f"row of {hidden_size}."
        )
    if not span.embeddings.is_floating_point() or not span.embeddings.isfinite().all():
        raise InvalidRequest(f"{_name(span)} has embeddings that aren't finite numbers.")
    if not span.digest:
        raise InvalidRequest(f"{_name(span)} has no digest, which tells its medium from others.")


def _name(span: MediaSpan) -> str:
    return f"The span at position {span.start}"
