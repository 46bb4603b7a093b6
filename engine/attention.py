"""Paged attention over one group of KV blocks: the plain reference, and the fast one.

A step's attention of one kind (global or sliding) is planned once from the batch, then called by
every layer of that kind, so block indices and masks are not worked out per layer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.spec import AttentionKind
from engine.batch import Batch
from engine.one_row import OneRow

# A chunk's queries are cut so that its mask stays below this many elements (16 MiB in fp32).
MAX_SCORES = 1 << 22
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


class QuerySpan(NamedTuple):
    """The rows of one request in the batch."""

    request: int
    start: int  # first row
    length: int  # rows
    position: int  # of the first row


def query_spans(batch: Batch) -> list[QuerySpan]:
    """Each request's rows, in order."""
    spans, start = [], 0
    for request, (length, seq_len) in enumerate(zip(batch.query_lens, batch.seq_lens, strict=True)):
        spans.append(QuerySpan(request, start, length, seq_len - length))
        start += length
    return spans


def first_key(position: int, window: int | None) -> int:
    """The first position that a query at `position` sees."""
    return 0 if window is None else max(0, position - window + 1)


def visible(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Whether a query sees a key; the two shapes are broadcast."""
    sees = key_positions <= query_positions
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
        self._spans = query_spans(batch)
        self._table = batch.block_tables[kind]
        self._window, self._block_size = window, block_size

    def __call__(self, query: Tensor, kv: KVTensors) -> Tensor:
        num_heads, num_kv_heads = query.shape[1], kv.value.shape[2]
        out = torch.empty_like(query)
        for span in self._spans:
            blocks = self._table[span.request]
            positions = torch.arange(len(blocks) * self._block_size, device=blocks.device)
            keys, values = kv.keys(blocks, positions).float(), kv.values(blocks).float()
            for i in range(span.length):
                position = span.position + i
                seen = slice(first_key(position, self._window), position + 1)
                for head in range(num_heads):
                    kv_head = head * num_kv_heads // num_heads
                    weights = keys[seen, kv_head] @ query[span.start + i, head].float()
                    attended = weights.softmax(0) @ values[seen, kv_head]
                    out[span.start + i, head] = attended.to(out.dtype)
        return out.flatten(1)


class FastAttention:
    """Decodes in a few batched calls over gathered blocks; each prefill chunk in calls of its own.

    Only blocks that some query sees are touched: with a window, the cost doesn't grow with length.
    """

    def __init__(
        self,
        batch: Batch,
        kind: AttentionKind,
        window: int | None,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        table = batch.block_tables[kind]
        spans = query_spans(batch)
        decodes = [span for span in spans if span.length == 1]
        lengths = [s.position + 1 - first_key(s.position, window) for s in decodes]
        self._groups = [
            _plan_decodes([decodes[i] for i in bucket], table, window, block_size, dtype)
            for bucket in bucket_by_length(lengths)
        ]
        self._chunks = [
            _plan_chunk(part, table, window, block_size, dtype)
            for span in spans
            if span.length > 1
            for part in _cut(span, window)
        ]

    def __call__(self, query: Tensor, kv: KVTensors) -> Tensor:
        if not self._chunks and len(self._groups) == 1:
            return self._groups[0].attend(query, kv).flatten(1)
        out = torch.empty_like(query)
        for group in self._groups:
            out.index_copy_(0, group.rows, group.attend(query.index_select(0, group.rows), kv))
        for chunk in self._chunks:
            stop = chunk.start + chunk.length
            out[chunk.start : stop] = chunk.attend(query[chunk.start : stop], kv)
        return out.flatten(1)


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Requests with one query each, their keys padded to the longest."""

    rows: Tensor  # [num_requests], of the batch
    blocks: Tensor  # [num_requests * num_blocks]
    positions: Tensor  # [num_requests * num_blocks * block_size]
    keys: slice  # of the gathered keys; cuts one request's to what it sees, so needs no mask
    mask: Tensor | None  # [num_requests, 1, 1, num_keys], added to the scores

    def attend(self, query: Tensor, kv: KVTensors) -> Tensor:
        """[num_requests, num_heads, head_dim] -> the same shape."""
        num_requests, _, head_dim = query.shape
        keys, values = kv.keys(self.blocks, self.positions), kv.values(self.blocks)
        key, value = (_by_request(t, num_requests)[:, :, self.keys] for t in (keys, values))
        # The heads that share a key head are its queries: no key is repeated.
        grouped = query.view(num_requests, key.shape[1], -1, head_dim)
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=self.mask, scale=1.0)
        return out.reshape(query.shape)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Consecutive queries of one request."""

    start: int  # first row of the batch
    length: int
    blocks: Tensor  # [num_blocks]
    positions: Tensor  # [num_blocks * block_size]
    num_keys: int
    mask: Tensor  # [length, num_keys], added to the scores

    def attend(self, query: Tensor, kv: KVTensors) -> Tensor:
        """[length, num_heads, head_dim] -> the same shape."""
        keys, values = kv.keys(self.blocks, self.positions), kv.values(self.blocks)
        key, value = (_by_request(t, 1)[0, :, None, : self.num_keys] for t in (keys, values))
        num_kv_heads, head_dim = key.shape[0], key.shape[-1]
        grouped = query.view(self.length, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        shape = (num_kv_heads, grouped.shape[1], self.num_keys, head_dim)
        out = F.scaled_dot_product_attention(
            grouped,
            key.expand(shape),
            value.expand(shape),
            attn_mask=self.mask,
            scale=1.0,
        )
        return out.permute(2, 0, 1, 3).reshape(query.shape)


def _plan_decodes(
    spans: list[QuerySpan],
    table: Tensor,
    window: int | None,
    block_size: int,
    dtype: torch.dtype,
) -> _Decodes:
    device = table.device
    firsts = [first_key(span.position, window) for span in spans]
    begins = [first // block_size for first in firsts]
    num_blocks = max(
        span.position // block_size - begin + 1 for span, begin in zip(spans, begins, strict=True)
    )
    rows = torch.tensor([span.start for span in spans], device=device)
    begin = torch.tensor(begins, device=device)[:, None]
    blocks = (begin + torch.arange(num_blocks, device=device)).clamp_(max=table.shape[1] - 1)
    if len(spans) < len(table):
        table = table[torch.tensor([span.request for span in spans], device=device)]
    blocks = table.gather(1, blocks).flatten()
    key_positions = begin * block_size + torch.arange(num_blocks * block_size, device=device)
    if len(spans) == 1:
        offset = begins[0] * block_size
        keys = slice(firsts[0] - offset, spans[0].position + 1 - offset)
        return _Decodes(rows, blocks, key_positions.flatten(), keys, None)
    positions = torch.tensor([span.position for span in spans], device=device)[:, None]
    mask = _additive_mask(visible(positions, key_positions, window), dtype)
    mask = mask[:, None, None, :]
    return _Decodes(rows, blocks, key_positions.flatten(), slice(None), mask)


def _cut(span: QuerySpan, window: int | None) -> list[QuerySpan]:
    """The span in parts whose masks stay small."""
    longest = span.position + span.length
    if window is not None:
        longest = min(longest, window + span.length)
    step = max(16, MAX_SCORES // longest)
    return [
        span._replace(
            start=span.start + i, length=min(step, span.length - i), position=span.position + i
        )
        for i in range(0, span.length, step)
    ]


def _plan_chunk(
    span: QuerySpan, table: Tensor, window: int | None, block_size: int, dtype: torch.dtype
) -> _Chunk:
    device = table.device
    begin = first_key(span.position, window) // block_size
    end = span.position + span.length
    blocks = table[span.request, begin : math.ceil(end / block_size)]
    first, num_keys = begin * block_size, end - begin * block_size
    key_positions = first + torch.arange(len(blocks) * block_size, device=device)
    positions = torch.arange(span.position, end, device=device)[:, None]
    mask = _additive_mask(visible(positions, key_positions[:num_keys], window), dtype)
    return _Chunk(span.start, span.length, blocks, key_positions, num_keys, mask)


def _by_request(gathered: Tensor, num_requests: int) -> Tensor:
    """Keys (or values) as [num_requests, num_kv_heads, num_keys, head_dim]."""
    return gathered.view(num_requests, -1, *gathered.shape[1:]).transpose(1, 2)


def _additive_mask(sees: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, -math.inf)
