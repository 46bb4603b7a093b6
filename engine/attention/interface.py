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
from engine.attention.shared_kv import SharedKV
from engine.batch import Batch

# Decodes are grouped by the power of two of their length; all below this go together.
MIN_BUCKET = 512


@dataclass(frozen=True, slots=True)
class KVTensors:
    """The KV blocks of one layer; a flat KV slot is block * block_size + offset.

    Where keys and values share one projection no keys are cached: `shared_kv` forms them.
    """

    key: Tensor | None  # [num_blocks, block_size, num_kv_heads, head_dim]
    value: Tensor  # the same shape
    shared_kv: SharedKV | None = None

    @property
    def is_raw(self) -> bool:
        """True if `value` holds raw projections."""
        return self.shared_kv is not None and self.shared_kv.is_raw

    @property
    def holds_values_alone(self) -> bool:
        """True if values are cached, and keys formed from them."""
        return self.shared_kv is not None and not self.shared_kv.is_raw

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The cached tensors: what a block's bytes are."""
        return (self.value,) if self.key is None else (self.key, self.value)

    def by_slot(self) -> tuple[Tensor | None, Tensor]:
        """Return keys and values as [num_kv_slots, num_kv_heads, head_dim]."""
        return None if self.key is None else self.key.flatten(0, 1), self.value.flatten(0, 1)

    def keys(self, blocks: Tensor, positions: Tensor) -> Tensor:
        """Gather, or form, the keys of some blocks.

        Args:
            blocks: [num_blocks] int64.
            positions: [num_blocks * block_size], of the tokens in them.

        Returns:
            [num_blocks * block_size, num_kv_heads, head_dim].
        """
        if self.key is not None:
            return self.key.index_select(0, blocks).flatten(0, 1)
        assert self.shared_kv is not None
        return self.shared_kv.keys(self._rows(blocks), positions)

    def values(self, blocks: Tensor) -> Tensor:
        """Gather, or form, the values of blocks [num_blocks], in the shape of their keys."""
        rows = self._rows(blocks)
        return rows if self.shared_kv is None else self.shared_kv.values(rows)

    def _rows(self, blocks: Tensor) -> Tensor:
        return self.value.index_select(0, blocks).flatten(0, 1)


class Attention(Protocol):
    """Attention of one kind for one step."""

    def __call__(self, query: Tensor, kv: KVTensors) -> Tensor:
        """Attend: [num_tokens, num_heads, head_dim] -> [num_tokens, num_heads * head_dim].

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
    """Return each request's rows, in order."""
    spans, start = [], 0
    for request, (length, seq_len) in enumerate(zip(batch.query_lens, batch.seq_lens, strict=True)):
        spans.append(RequestRows(request, start, length, seq_len - length))
        start += length
    return spans


def first_key(position: int, window: int | None) -> int:
    """Return the first position that a query at `position` sees."""
    return 0 if window is None else max(0, position - window + 1)


def visible(
    query_positions: Tensor,
    key_positions: Tensor,
    window: int | None,
    last_keys: Tensor | None = None,
) -> Tensor:
    """Return which query sees which key; the shapes are broadcast.

    `last_keys` are the last positions that the queries see, where that isn't their own.
    """
    sees = key_positions <= (query_positions if last_keys is None else last_keys)
    return sees if window is None else sees & (key_positions > query_positions - window)


def bucket_by_length(lengths: list[int]) -> list[list[int]]:
    """Group the indices of `lengths` so that a group's lengths are within a factor of two."""
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
