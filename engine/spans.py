"""MediaSpan: the embeddings of an image or of audio in place of some tokens of a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from cluster.errors import InvalidRequest


@dataclass(frozen=True, slots=True, eq=False)
class MediaSpan:
    """Embeddings of one medium, for successive positions of a prompt.

    They take the place of the tokens' own embeddings, so that the token ids there don't matter. In
    sliding layers the positions of a bidirectional span attend to each other, as far as the window
    reaches; global layers stay causal.
    """

    start: int  # the first position in the prompt
    embeddings: Tensor  # [num_tokens, hidden_size], from a tower's projector, not scaled
    digest: bytes  # names the embeddings: equal digests mean equal embeddings
    is_bidirectional: bool = False

    @property
    def num_tokens(self) -> int:
        """Positions of the span."""
        return len(self.embeddings)

    @property
    def stop(self) -> int:
        """The position behind its last one."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True, eq=False)
class Overlay:
    """The part of a span that a batch computes; a bidirectional span is never cut."""

    request: int  # its index in the batch
    row: int  # its first row in the batch
    position: int  # the position of that row in the prompt
    _: KW_ONLY
    embeddings: Tensor  # [num_rows, hidden_size]
    is_bidirectional: bool

    @property
    def rows(self) -> slice:
        """Its rows in the batch."""
        return slice(self.row, self.row + len(self.embeddings))

    @property
    def last_position(self) -> int:
        """The position of its last row in the prompt."""
        return self.position + len(self.embeddings) - 1

    def to(self, device: torch.device | str) -> Overlay:
        """Copy the embeddings to a device."""
        return replace(self, embeddings=self.embeddings.to(device, non_blocking=True))


def overlays(
    spans: Sequence[MediaSpan], start: int, stop: int, *, request: int, row: int
) -> Iterator[Overlay]:
    """Yield the parts of a request's spans that a step computes.

    Args:
        spans: All of the request's spans.
        start: The first position that the step computes.
        stop: The position behind the last one.
        request: The request's index in the batch.
        row: The row of `start` in the batch.
    """
    for span in spans:
        first, end = max(start, span.start), min(stop, span.stop)
        if first < end:
            embeddings = span.embeddings[first - span.start : end - span.start]
            yield Overlay(
                request,
                row + first - start,
                first,
                embeddings=embeddings,
                is_bidirectional=span.is_bidirectional,
            )


def uncut(spans: Sequence[MediaSpan], position: int) -> int:
    """Return `position`, or the start of the bidirectional span that a step ending there would cut.

    The tokens of such a span must be computed together.
    """
    for span in spans:
        if span.is_bidirectional and span.start < position < span.stop:
            return span.start
    return position


def uncut_blocks(spans: Sequence[MediaSpan], num_blocks: int, block_size: int) -> int:
    """Return the most blocks, up to `num_blocks`, after which resuming cuts no span."""
    while (end := uncut(spans, num_blocks * block_size) // block_size) < num_blocks:
        num_blocks = end
    return num_blocks


def longest_step(spans: Sequence[MediaSpan]) -> int:
    """Return the most tokens that some step has to compute together."""
    return max((span.num_tokens for span in spans if span.is_bidirectional), default=1)


def media_digests(spans: Sequence[MediaSpan], start: int, stop: int) -> bytes:
    """Name the media at the positions [start, stop), for the hash of a block."""
    return b"".join(
        repr((s.start - start, s.num_tokens, s.is_bidirectional, s.digest)).encode()
        for s in spans
        if s.start < stop and start < s.stop
    )


def check_spans(
    spans: Sequence[MediaSpan], num_prompt_tokens: int, hidden_size: int
) -> list[MediaSpan]:
    """Check a request's spans and return them in order.

    Raises:
        InvalidRequest: They overlap, don't fit a prompt of this length or a model of this width, or
            have no digest.
    """
    ordered = sorted(spans, key=lambda span: span.start)
    for span in ordered:
        _check_embeddings(span, hidden_size)
        if span.start < 0 or span.stop > num_prompt_tokens:
            raise InvalidRequest(
                f"{_name(span)} has {span.num_tokens} tokens and isn't inside the prompt, "
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
        raise InvalidRequest(f"{_name(span)} has no digest, which identifies its medium.")


def _name(span: MediaSpan) -> str:
    return f"The span at position {span.start}"
