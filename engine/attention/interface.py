"""Paged attention over one group of KV blocks: the interface, and the plain reference.

A step's attention of one kind (global or sliding) is planned once from the batch, then called by
every layer of that kind, so block indices and masks are not worked out per layer.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cluster.spec import AttentionKind
from engine.attention.one_row import OneRow
from engine.batch import Batch

# Decodes are grouped by the power of two of their length; all below this go together.
MIN_BUCKET = 512


@dataclass(frozen=True, slots=True)
class KVTensors:
    """The KV blocks of one layer; a flat slot is block * block_size + offset.

    A layer that keeps one row for a token has no keys, and `value` holds its rows.
    """

    key: Tensor | None  # [num_blocks, block_size, num_kv_heads, head_dim]
    value: Tensor  # the same shape
    one_row: OneRow | None = None

    @property
    def is_raw(self) -> bool:
        return self.one_row is not None and self.one_row.is_raw

    @property
    def is_v(self) -> bool:
        """Whether values alone are kept."""
        return self.one_row is not None and not self.one_row.is_raw

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """All that is held: what a block's bytes are."""
        return (self.value,) if self.key is None else (self.key, self.value)

    def by_slot(self) -> tuple[Tensor | None, Tensor]:
        """Keys and values as [num_slots, num_kv_heads, head_dim]."""
        return None if self.key is None else self.key.flatten(0, 1), self.value.flatten(0, 1)

    def keys(self, blocks: Tensor, positions: Tensor) -> Tensor:
        """The keys in blocks [num_blocks], at positions [num_blocks * block_size], as
        [num_blocks * block_size, num_kv_heads, head_dim].
        """
        if self.key is not None:
            return self.key.index_select(0, blocks).flatten(0, 1)
        assert self.one_row is not None
        return self.one_row.keys(self._rows(blocks), positions)

    def values(self, blocks: Tensor) -> Tensor:
        """The values in blocks [num_blocks], in the shape of their keys."""
        rows = self._rows(blocks)
        return rows if self.one_row is None else self.one_row.values(rows)

    def _rows(self, blocks: Tensor) -> Tensor:
        return self.value.index_select(0, blocks).flatten(0, 1)


class Attention(Protocol):
    """Attention of one kind for one step."""

    def __call__(self, query: Tensor, kv: KVTensors) -> Tensor:
        """query [num_tokens, num_heads, head_dim] -> [num_tokens, num_heads * head_dim].

        Keys and values of this step are already in `kv`. Scores aren't scaled: Gemma 4 norms
        queries and keys. Query head h reads key head h // (num_heads // num_kv_heads).
        """
        ...


class RequestRows(NamedTuple):
    """The rows of one request in the batch."""

    request: int
    start: int  # first row
    length: int  # rows
    position: int  # of the first row


def request_rows(batch: Batch) -> list[RequestRows]:
    """Each request's rows, in order."""
    spans, start = [], 0
    for request, (length, seq_len) in enumerate(zip(batch.query_lens, batch.seq_lens, strict=True)):
        spans.append(RequestRows(request, start, length, seq_len - length))
        start += length
    return spans


def first_key(position: int, window: int | None) -> int:
    """The first position that a query at `position` sees."""
    return 0 if window is None else max(0, position - window + 1)


def visible(
    query_positions: Tensor,
    key_positions: Tensor,
    window: int | None,
    last_keys: Tensor | None = None,
) -> Tensor:
    """Whether a query sees a key; the shapes are broadcast. `last_keys` are the last positions that
    the queries see, where it isn't their own.
    """
    sees = key_positions <= (query_positions if last_keys is None else last_keys)
    return sees if window is None else sees & (key_positions > query_positions - window)


def bucket_by_length(lengths: list[int]) -> list[list[int]]:
    """Indices of `lengths` in groups whose members are within a factor of two of each other."""
    buckets: defaultdict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        buckets[(max(length, MIN_BUCKET) - 1).bit_length()].append(index)
    return list(buckets.values())


class ReferenceAttention:
    """One query at a time, as the definition says: what the others are compared with."""

    def __init__(
        self, batch: Batch, kind: AttentionKind, window: int | None, block_size: int
    ) -> None:
        self._spans = request_rows(batch)
        self._table = batch.block_tables[kind]
        self._window, self._block_size = window, block_size
        self._last_keys = {
            overlay.row + i: overlay.last_position
            for overlay in batch.overlays
            if overlay.is_bidirectional and window is not None
            for i in range(len(overlay.embeddings))
        }

    def __call__(self, query: Tensor, kv: KVTensors) -> Tensor:
        num_heads, num_kv_heads = query.shape[1], kv.value.shape[2]
        out = torch.empty_like(query)
        for span in self._spans:
            blocks = self._table[span.request]
            positions = torch.arange(len(blocks) * self._block_size, device=blocks.device)
            keys, values = kv.keys(blocks, positions).float(), kv.values(blocks).float()
            for i in range(span.length):
                position = span.position + i
                last_key = self._last_keys.get(span.start + i, position)
                seen = slice(first_key(position, self._window), last_key + 1)
                for head in range(num_heads):
                    kv_head = head * num_kv_heads // num_heads
                    weights = keys[seen, kv_head] @ query[span.start + i, head].float()
                    attended = weights.softmax(0) @ values[seen, kv_head]
                    out[span.start + i, head] = attended.to(out.dtype)
        return out.flatten(1)
