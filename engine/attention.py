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

# A chunk's queries are cut so that its mask stays below this many elements (16 MiB in fp32).
MAX_SCORES = 1 << 22
# Decodes are grouped by the power of two of their length; all below this go together.
MIN_BUCKET = 512


class KVTensors(NamedTuple):
    """The KV blocks of one layer; a flat slot is block * block_size + offset."""

    key: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    value: Tensor  # the same shape

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """All that is held: what a block's bytes are."""
        return self.key, self.value

    def by_slot(self) -> tuple[Tensor, Tensor]:
        """Keys and values as [num_slots, num_kv_heads, head_dim]."""
        return self.key.flatten(0, 1), self.value.flatten(0, 1)


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
        num_heads, num_kv_heads = query.shape[1], kv.key.shape[2]
        out = torch.empty_like(query)
        for span in self._spans:
            for i in range(span.length):
                position = span.position + i
                keys = range(first_key(position, self._window), position + 1)
                slots = [self._slot(span.request, p) for p in keys]
                for head in range(num_heads):
                    kv_head = head * num_kv_heads // num_heads
                    key = kv.key.flatten(0, 1)[slots, kv_head].float()
                    value = kv.value.flatten(0, 1)[slots, kv_head].float()
                    weights = (key @ query[span.start + i, head].float()).softmax(0)
                    out[span.start + i, head] = (weights @ value).to(out.dtype)
        return out.flatten(1)

    def _slot(self, request: int, position: int) -> int:
        block = int(self._table[request, position // self._block_size])
        return block * self._block_size + position % self._block_size


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
    keys: slice  # of the gathered keys; cuts one request's to what it sees, so needs no mask
    mask: Tensor | None  # [num_requests, 1, 1, num_keys], added to the scores

    def attend(self, query: Tensor, kv: KVTensors) -> Tensor:
        """[num_requests, num_heads, head_dim] -> the same shape."""
        num_requests, _, head_dim = query.shape
        key = _gather(kv.key, self.blocks, num_requests)[:, :, self.keys]
        value = _gather(kv.value, self.blocks, num_requests)[:, :, self.keys]
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
    num_keys: int
    mask: Tensor  # [length, num_keys], added to the scores

    def attend(self, query: Tensor, kv: KVTensors) -> Tensor:
        """[length, num_heads, head_dim] -> the same shape."""
        key = _gather(kv.key, self.blocks, 1)[0, :, None, : self.num_keys]
        value = _gather(kv.value, self.blocks, 1)[0, :, None, : self.num_keys]
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
    if len(spans) == 1:
        offset = begins[0] * block_size
        keys = slice(firsts[0] - offset, spans[0].position + 1 - offset)
        return _Decodes(rows, blocks, keys, None)
    key_positions = begin * block_size + torch.arange(num_blocks * block_size, device=device)
    positions = torch.tensor([span.position for span in spans], device=device)[:, None]
    mask = _additive_mask(visible(positions, key_positions, window), dtype)
    return _Decodes(rows, blocks, slice(None), mask[:, None, None, :])


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
    key_positions = torch.arange(begin * block_size, end, device=device)
    positions = torch.arange(span.position, end, device=device)[:, None]
    mask = _additive_mask(visible(positions, key_positions, window), dtype)
    return _Chunk(span.start, span.length, blocks, len(key_positions), mask)


def _gather(kv_blocks: Tensor, blocks: Tensor, num_requests: int) -> Tensor:
    """The keys (or values) of blocks, as [num_requests, num_kv_heads, num_keys, head_dim]."""
    _, _, num_kv_heads, head_dim = kv_blocks.shape
    gathered = kv_blocks.index_select(0, blocks)
    return gathered.view(num_requests, -1, num_kv_heads, head_dim).transpose(1, 2)


def _additive_mask(sees: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, -math.inf)
