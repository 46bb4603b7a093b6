"""Paged attention whose bits for a query depend on nothing but that query's own context.

Keys are taken in blocks of fixed size, aligned to absolute positions. Scores are shifted by the
exact maximum over the keys seen, each block is reduced by products of one fixed width, and the
blocks are added in order of position. A block that a query doesn't see adds exact zeros, so neither
padding nor the cut of the prefill nor the other requests change a bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.errors import ConfigError
from cluster.kernels.invariant import TILE_ROWS
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

KEY_BLOCK = 64  # keys reduced together
CHUNK_ROWS = 128  # rows (queries x heads of a key head) of a prefill tile, where any number will do
MAX_SCORES = 1 << 24  # elements of one tile's scores, 64 MiB
HELD_BLOCKS = 16  # key blocks whose keys, or weighted values, are held at a time


class InvariantAttention:
    """Implements engine.attention.Attention; computes in fp32 whatever the KV blocks hold."""

    def __init__(
        self, batch: Batch, kind: AttentionKind, window: int | None, block_size: int
    ) -> None:
        self._spans = request_rows(batch)
        self._table = batch.block_tables[kind]
        self._window, self._block_size = window, block_size
        self._key_block = block_size * math.ceil(KEY_BLOCK / block_size)
        self._plans: dict[int, list[_Tiles]] = {}

    def __call__(self, query: Tensor, kv: KVTensors) -> Tensor:
        group_size = query.shape[1] // kv.value.shape[2]
        tiles = self._plans.get(group_size)
        if tiles is None:
            any_rows = query.dtype is torch.float32 and query.device.type == "cpu"
            tiles = self._plans[group_size] = self._plan(group_size, any_rows)
        out = torch.empty_like(query)
        for tile in tiles:
            out.index_copy_(0, tile.rows.flatten(), tile.attend(query, kv))
        return out.flatten(1)

    def _plan(self, group_size: int, any_rows: bool) -> list[_Tiles]:
        """Cut the queries in tiles; all decodes of like length are one batch of tiles.

        `any_rows`: the number of rows in a product doesn't matter from TILE_ROWS up (see
        cluster.invariant), so prefill tiles may be larger than decode tiles.
        """
        decode_size = math.ceil(TILE_ROWS / group_size)
        chunk_size = max(decode_size, CHUNK_ROWS // group_size) if any_rows else decode_size
        decodes = [span for span in self._spans if span.length == 1]
        buckets = bucket_by_length([self._num_keys(span) for span in decodes])
        plans = [self._tiles([decodes[i] for i in bucket], decode_size) for bucket in buckets]
        for span in self._spans:
            if span.length > 1:
                longest = span.position + span.length
                fits = MAX_SCORES // (longest * group_size)
                size = max(decode_size, min(chunk_size, fits))
                plans += [self._tiles([part], size) for part in _cut(span, size)]
        return plans

    def _num_keys(self, span: RequestRows) -> int:
        return span.position + span.length - first_key(span.position, self._window)

    def _tiles(self, spans: list[RequestRows], size: int) -> _Tiles:
        """One tile of `size` queries per span; a short one repeats its last query."""
        device, key_block = self._table.device, self._key_block
        steps = [[min(i, span.length - 1) for i in range(size)] for span in spans]
        pairs = list(zip(spans, steps, strict=True))
        rows = torch.tensor([[s.start + i for i in step] for s, step in pairs], device=device)
        at = torch.tensor([[s.position + i for i in step] for s, step in pairs], device=device)
        begins = [first_key(span.position, self._window) // key_block for span in spans]
        ends = [(span.position + span.length - 1) // key_block + 1 for span in spans]
        num_blocks = max(end - begin for begin, end in zip(begins, ends, strict=True))
        begin = torch.tensor(begins, device=device)[:, None]
        keys = begin * key_block + torch.arange(num_blocks * key_block, device=device)
        sees = visible(at[:, :, None], keys[:, None, :], self._window)
        hidden = ~sees.view(len(spans), size, num_blocks, key_block).transpose(1, 2)
        entries = (keys[:, :: self._block_size] // self._block_size).clamp_(
            max=self._table.shape[1] - 1
        )
        requests = torch.tensor([span.request for span in spans], device=device)
        blocks = self._table[requests].gather(1, entries).view(len(spans), num_blocks, -1)
        keys = keys.view(len(spans), num_blocks, key_block)
        return _Tiles(rows, blocks, keys, hidden[:, :, None, :, None, :])


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Tiles of queries of equal shape, each with its own key blocks."""

    rows: Tensor  # [num_tiles, num_queries], of the batch
    blocks: Tensor  # [num_tiles, num_key_blocks, KV blocks in a key block]
    positions: Tensor  # [num_tiles, num_key_blocks, key_block]
    hidden: Tensor  # [num_tiles, num_key_blocks, 1, num_queries, 1, key_block] bool

    def attend(self, query: Tensor, kv: KVTensors) -> Tensor:
        """query [num_tokens, num_heads, head_dim] -> [num_tiles * num_queries, same]."""
        num_tiles, _, _, num_queries, _, key_block = self.hidden.shape
        _, _, num_kv_heads, head_dim = kv.value.shape
        group_size = query.shape[1] // num_kv_heads
        # rows of a product: [num_tiles, 1, num_kv_heads, num_queries * group_size, head_dim]
        tile = query.index_select(0, self.rows.flatten()).float()
        tile = tile.view(num_tiles, 1, num_queries, num_kv_heads, group_size, head_dim)
        tile = tile.transpose(2, 3).flatten(3, 4)

        scores = self._scores(tile, kv)
        grouped = scores.view(*scores.shape[:3], num_queries, group_size, key_block)
        grouped.masked_fill_(self.hidden, -math.inf)
        weights = scores.sub_(scores.amax((1, 4), keepdim=True)).exp_()
        total = _sum_in_order(weights.sum(-1, keepdim=True))
        out = self._weighted_values(weights, kv) / total
        out = out.view(num_tiles, num_kv_heads, num_queries, group_size, head_dim)
        return out.transpose(1, 2).reshape(-1, *query.shape[1:]).to(query.dtype)

    def _scores(self, tile: Tensor, kv: KVTensors) -> Tensor:
        """[num_tiles, num_key_blocks, num_kv_heads, rows, key_block], a few blocks at a time."""
        products = []
        parts = (torch.split(t, HELD_BLOCKS, 1) for t in (self.blocks, self.positions))
        for blocks, positions in zip(*parts, strict=True):
            keys = kv.keys(blocks.flatten(), positions.flatten()).float()
            by_head = keys.view(*positions.shape, *keys.shape[1:]).permute(0, 1, 3, 4, 2)
            products.append(torch.matmul(tile, by_head))
        return torch.cat(products, 1)

    def _weighted_values(self, weights: Tensor, kv: KVTensors) -> Tensor:
        """Sum over key blocks (dim 1) of weights @ values, a few blocks at a time."""
        total: Tensor | None = None
        parts = (torch.split(t, HELD_BLOCKS, 1) for t in (weights, self.blocks))
        for some_weights, blocks in zip(*parts, strict=True):
            values = kv.values(blocks.flatten()).float()
            shape = *blocks.shape[:2], weights.shape[-1], *values.shape[1:]
            by_head = values.view(shape).transpose(2, 3)
            total = _sum_in_order(torch.matmul(some_weights, by_head), total)
        assert total is not None
        return total


def check_attention(
    plan: Callable[[Batch, AttentionKind, int | None, int], Attention],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Try one request's last query alone, at the end of a chunk, and beside another request.

    Raises ConfigError when its bits differ on this machine.
    """
    block_size, seq_len, kind = 16, 3 * KEY_BLOCK + 5, AttentionKind.GLOBAL
    num_blocks = seq_len // block_size + 1
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    shape = (2 * num_blocks + 1, block_size, num_kv_heads, head_dim)
    kv = KVTensors(draw(*shape), draw(*shape))
    query = draw(40, num_heads, head_dim) * head_dim**-0.5
    table = torch.arange(1, 2 * num_blocks + 1, device=device).view(2, num_blocks)

    def last_row(query_lens: list[int], seq_lens: list[int]) -> Tensor:
        spans = zip(query_lens, seq_lens, strict=True)
        positions = torch.cat([torch.arange(end - num, end) for num, end in spans])
        tables = {kind: table[-len(seq_lens) :]}
        unused = torch.empty(0, dtype=torch.int64)
        batch = Batch(unused, positions.to(device), query_lens, seq_lens, tables, {}, unused)
        return plan(batch, kind, None, block_size)(query[-len(positions) :], kv)[-1]

    alone = last_row([1], [seq_len])
    others = last_row([40], [seq_len]), last_row([1, 1], [KEY_BLOCK, seq_len])
    if not all(torch.equal(alone, other) for other in others):
        raise ConfigError(
            f"batch_invariant can't be kept on this machine: attention with {num_heads} heads of "
            f"{head_dim} in {dtype} on {device} changes with the batch. Turn batch_invariant off."
        )


def _sum_in_order(terms: Tensor, start: Tensor | None = None) -> Tensor:
    """start plus the terms along dim 1, one by one: torch's own sum associates by their number."""
    for term in terms.unbind(1):
        start = term.clone() if start is None else start.add_(term)
    assert start is not None
    return start


def _cut(span: RequestRows, size: int) -> list[RequestRows]:
    return [
        RequestRows(span.request, span.start + i, min(size, span.length - i), span.position + i)
        for i in range(0, span.length, size)
    ]
