"""Paged attention: every backend equals the plain reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cluster.native import native_kernels
from cluster.spec import AttentionKind
from engine.attention import FastAttention, KVTensors, ReferenceAttention
from engine.batch import Batch
from engine.invariant_attention import InvariantAttention
from engine.native_attention import NativeAttention


@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("head_dim", [8, 144])
def test_attention_backends_agree(window: int | None, num_kv_heads: int, head_dim: int) -> None:
    kind, block_size = AttentionKind.GLOBAL, 4
    query_lens, seq_lens = [1, 9, 1, 1, 70], [30, 40, 1, 90, 70]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    kv = KVTensors(*(draw(200, block_size, num_kv_heads, head_dim) for _ in range(2)))
    table = torch.randperm(199, generator=generator)[: 5 * 23].view(5, 23) + 1
    spans = zip(query_lens, seq_lens, strict=True)
    positions = torch.cat([torch.arange(end - num, end) for num, end in spans])
    unused = torch.empty(0, dtype=torch.int64)
    batch = Batch(unused, positions, query_lens, seq_lens, {kind: table}, {}, unused)
    query = draw(sum(query_lens), 6, head_dim) * head_dim**-0.5
    expected = ReferenceAttention(batch, kind, window, block_size)(query, kv)
    fast = FastAttention(batch, kind, window, block_size, torch.float32)(query, kv)
    invariant = InvariantAttention(batch, kind, window, block_size)(query, kv)
    assert torch.allclose(fast, expected, atol=1e-5)
    assert torch.allclose(invariant, expected, atol=1e-5)
    kernels = native_kernels()
    assert kernels is not None
    native = NativeAttention(kernels, batch, kind, window)(query, kv)
    assert torch.allclose(native, expected, atol=1e-5)
