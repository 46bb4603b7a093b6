"""Random batches over a paged cache, and the same context in each KV layout."""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.kernels.torch_kernels import TorchKernels, rotate
from cluster.spec import AttentionKind, KVLayout, RopeSpec
from engine.attention.interface import KVTensors
from engine.attention.rotary import Rotary
from engine.attention.shared_kv import SharedKV
from engine.batch import Batch
from engine.cache.kv_cache_group import cdiv

KIND, BLOCK_SIZE, EPS = AttentionKind.GLOBAL, 4, 1e-6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_batch(query_lens: list[int], seq_lens: list[int]) -> Batch:
    """Requests whose blocks lie about, in a cache of 200."""
    width = cdiv(max(seq_lens), BLOCK_SIZE)
    order = torch.randperm(199, generator=torch.Generator().manual_seed(1))
    table = order[: len(seq_lens) * width].view(len(seq_lens), width) + 1
    spans = zip(query_lens, seq_lens, strict=True)
    positions = torch.cat([torch.arange(end - num, end) for num, end in spans])
    unused = torch.empty(0, dtype=torch.int64)
    return Batch(positions, positions, query_lens, seq_lens, {KIND: table}, {}, unused)


def make_kv(batch: Batch, num_kv_heads: int, head_dim: int) -> dict[KVLayout, KVTensors]:
    """Build one context in three layouts; separate keys are formed as when a token is computed."""
    raw = draw(200, BLOCK_SIZE, num_kv_heads, head_dim)
    rotary = Rotary(RopeSpec(1e4, 0.25), head_dim, raw.device, raw.dtype)
    weight = 1 + 0.1 * draw(head_dim)
    value = TorchKernels().rms_norm(raw, None, EPS)
    positions = torch.zeros(200, BLOCK_SIZE, dtype=torch.int64)
    for blocks in batch.block_tables[KIND]:
        positions[blocks] = torch.arange(len(blocks) * BLOCK_SIZE).view(-1, BLOCK_SIZE)
    rotation = rotary(positions.flatten())
    key = rotate((value * weight).flatten(0, 1), *rotation).view(raw.shape)
    return {
        "values": KVTensors(None, value, SharedKV(weight, rotary)),
        "projection": KVTensors(None, raw, SharedKV(weight, rotary, EPS)),
        "separate": KVTensors(key, value),
    }
