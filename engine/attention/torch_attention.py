"""Paged attention by PyTorch's operations: any device, any dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.spec import AttentionKind
from engine.attention.interface import (
    Attention,
    KVTensors,
    RequestRows,
    bucket_by_length,
    first_key,
    request_rows,
    visible,
)
from engine.batch import Batch
from engine.spans import Overlay

# A chunk's queries are cut so that its mask stays below this many elements (16 MiB in fp32).
MAX_SCORES = 1 << 22
PART_KEYS = 1 << 13  # keys of a request that are gathered, or formed, at a time
LOWEST = -1e30  # below every score, and finite: a part may hide all its keys from a query


_Part = tuple[Tensor, Tensor, Tensor | None]  # keys and values of some blocks, and their mask


class FastAttention:
    """Decodes in a few batched calls over gathered blocks; each prefill chunk in calls of its own.

    Only blocks that some query sees are touched: with a window, the cost doesn't grow with length.
    Of a long context a part is held at a time.
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
        spans = request_rows(batch)
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


class SpanAttention:
    """Lets the tokens of bidirectional spans see each other in a sliding layer, whatever computes
    the causal attention of the batch: their rows are computed once more, each span in calls of its
    own, so that no bit of them depends on the rest of the batch either.
    """

    def __init__(
        self,
        causal: Attention,
        batch: Batch,
        kind: AttentionKind,
        window: int,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        self._causal = causal
        table = batch.block_tables[kind]
        self._chunks = [
            _plan_chunk(part, table, window, block_size, dtype, overlay.last_position)
            for overlay in batch.overlays
            if overlay.is_bidirectional
            for part in _cut(_queries(overlay), window)
        ]

    def __call__(self, query: Tensor, kv: KVTensors) -> Tensor:
        out = self._causal(query, kv)
        for chunk in self._chunks:
            rows = slice(chunk.start, chunk.start + chunk.length)
            out[rows] = chunk.attend(query[rows], kv).flatten(1)
        return out


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Requests with one query each, their keys padded to the longest."""

    rows: Tensor  # [num_requests], of the batch
    blocks: Tensor  # [num_requests, num_blocks]
    positions: Tensor  # [num_requests, num_blocks * block_size]
    keys: slice  # of the gathered keys; cuts one request's to what it sees, so needs no mask
    mask: Tensor | None  # [num_requests, 1, 1, num_keys], added to the scores

    def attend(self, query: Tensor, kv: KVTensors) -> Tensor:
        """[num_requests, num_heads, head_dim] -> the same shape."""
        # The heads that share a key head are its queries: no key is repeated.
        grouped = query.view(len(query), kv.value.shape[2], -1, query.shape[-1])
        return _attend(grouped, self._parts(kv)).reshape(query.shape)

    def _parts(self, kv: KVTensors) -> Iterator[_Part]:
        for blocks, slots in _cut_blocks(self.blocks.shape[1], kv.value.shape[1]):
            ids, positions = self.blocks[:, blocks].flatten(), self.positions[:, slots].flatten()
            keys, values = kv.keys(ids, positions), kv.values(ids)
            key, value = (_by_request(t, len(self.rows))[:, :, self.keys] for t in (keys, values))
            yield key, value, None if self.mask is None else self.mask[..., slots]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Consecutive queries of one request."""

    start: int  # first row of the batch
    length: int
    blocks: Tensor  # [num_blocks]
    positions: Tensor  # [num_blocks * block_size]
    mask: Tensor  # [length, num_keys], added to the scores

    def attend(self, query: Tensor, kv: KVTensors) -> Tensor:
        """[length, num_heads, head_dim] -> the same shape."""
        num_kv_heads, head_dim = kv.value.shape[2:]
        grouped = query.view(self.length, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        out = _attend(grouped, self._parts(kv, grouped.shape[1]))
        return out.permute(2, 0, 1, 3).reshape(query.shape)

    def _parts(self, kv: KVTensors, group_size: int) -> Iterator[_Part]:
        for blocks, slots in _cut_blocks(len(self.blocks), kv.value.shape[1]):
            mask = self.mask[:, slots]
            ids = self.blocks[blocks]
            gathered = kv.keys(ids, self.positions[slots]), kv.values(ids)
            key, value = (
                _by_request(t, 1)[0, :, None, : mask.shape[1]].expand(-1, group_size, -1, -1)
                for t in gathered
            )
            yield key, value, mask


def _plan_decodes(
    spans: list[RequestRows],
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
    blocks = table.gather(1, blocks)
    key_positions = begin * block_size + torch.arange(num_blocks * block_size, device=device)
    if key_positions.numel() <= PART_KEYS and len(spans) == 1:
        offset = begins[0] * block_size
        keys = slice(firsts[0] - offset, spans[0].position + 1 - offset)
        return _Decodes(rows, blocks, key_positions, keys, None)
    positions = torch.tensor([span.position for span in spans], device=device)[:, None]
    mask = _additive_mask(visible(positions, key_positions, window), dtype)
    return _Decodes(rows, blocks, key_positions, slice(None), mask[:, None, None, :])


def _queries(overlay: Overlay) -> RequestRows:
    num_rows = len(overlay.embeddings)
    return RequestRows(overlay.request, overlay.row, num_rows, overlay.position)


def _cut(span: RequestRows, window: int | None) -> list[RequestRows]:
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
    span: RequestRows,
    table: Tensor,
    window: int | None,
    block_size: int,
    dtype: torch.dtype,
    last_key: int | None = None,
) -> _Chunk:
    """`last_key`: what all queries see up to; None: each up to itself."""
    device = table.device
    begin = first_key(span.position, window) // block_size
    stop = span.position + span.length
    end = stop if last_key is None else last_key + 1
    blocks = table[span.request, begin : math.ceil(end / block_size)]
    first, num_keys = begin * block_size, end - begin * block_size
    key_positions = first + torch.arange(len(blocks) * block_size, device=device)
    positions = torch.arange(span.position, stop, device=device)[:, None]
    last_keys = None if last_key is None else torch.full_like(positions, last_key)
    sees = visible(positions, key_positions[:num_keys], window, last_keys)
    mask = _additive_mask(sees, dtype)
    return _Chunk(span.start, span.length, blocks, key_positions, mask)


def _cut_blocks(num_blocks: int, block_size: int) -> Iterator[tuple[slice, slice]]:
    """Blocks, and slots in them, of each part."""
    step = max(1, PART_KEYS // block_size)
    for i in range(0, num_blocks, step):
        yield slice(i, i + step), slice(i * block_size, (i + step) * block_size)


def _attend(query: Tensor, parts: Iterator[_Part]) -> Tensor:
    """query [..., rows, head_dim] -> the same shape. A single part is left to PyTorch; the softmax
    over several is run in fp32, as in flash attention.
    """
    first, second = next(parts), next(parts, None)
    if second is None:
        key, value, mask = first
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
    best = torch.full_like(query[..., :1], LOWEST, dtype=torch.float32)
    total, out = torch.zeros_like(best), torch.zeros_like(query, dtype=torch.float32)
    for key, value, mask in chain((first, second), parts):
        scores = query.float() @ key.float().mT
        scores = scores if mask is None else scores.add_(mask)
        new_best = torch.maximum(best, scores.amax(-1, keepdim=True))
        decay, weights = (best - new_best).exp_(), (scores - new_best).exp_()
        total = total * decay + weights.sum(-1, keepdim=True)
        out = out * decay + weights @ value.float()
        best = new_best
    return (out / total).to(query.dtype)


def _by_request(gathered: Tensor, num_requests: int) -> Tensor:
    """Keys (or values) as [num_requests, num_kv_heads, num_keys, head_dim]."""
    return gathered.view(num_requests, -1, *gathered.shape[1:]).transpose(1, 2)


def _additive_mask(sees: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, -math.inf)
