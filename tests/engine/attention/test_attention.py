"""Paged attention: every backend equals the plain reference, whatever the cache keeps."""

from __future__ import annotations

import pytest
import torch

from cluster.kernels.native import native_kernels
from cluster.spec import KVLayout, RopeSpec
from engine.attention import torch_attention
from engine.attention.interface import Attention, ReferenceAttention
from engine.attention.invariant_attention import InvariantAttention
from engine.attention.native_attention import NativeAttention
from engine.attention.rotary import Rotary
from engine.attention.torch_attention import FastAttention
from engine.batch import Batch
from tests.support.engine.attention_cases import BLOCK_SIZE, KIND, draw, make_batch, make_kv

KV_LAYOUTS: tuple[KVLayout, ...] = ("values", "projection", "separate")


def make_backends(batch: Batch, window: int | None) -> list[Attention]:
    kernels = native_kernels()
    assert kernels is not None
    return [
        ReferenceAttention(batch, KIND, window, BLOCK_SIZE),
        FastAttention(batch, KIND, window, BLOCK_SIZE, torch.float32),
        InvariantAttention(batch, KIND, window, BLOCK_SIZE),
        NativeAttention(kernels.attend, batch, KIND, window),
    ]


@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("head_dim", [8, 144])
def test_backends_and_rows_agree(window: int | None, num_kv_heads: int, head_dim: int) -> None:
    batch = make_batch([1, 9, 1, 1, 70], [30, 40, 1, 90, 70])
    query = draw(batch.num_tokens, 6, head_dim) * head_dim**-0.5
    kv = make_kv(batch, num_kv_heads, head_dim)
    expected = ReferenceAttention(batch, KIND, window, BLOCK_SIZE)(query, kv["separate"])
    for attention in make_backends(batch, window):
        for kv_layout in KV_LAYOUTS:
            actual = attention(query, kv[kv_layout])
            assert torch.allclose(actual, expected, atol=1e-5), (attention, kv_layout)


def test_a_position_has_the_same_bits_in_a_step_and_in_the_table() -> None:
    rotary = Rotary(RopeSpec(1e6, 0.25), 64, torch.device("cpu"), torch.float32)
    positions = torch.tensor([0, 5, 1023, 1024, 2999, 77])
    in_step = rotary(positions)
    for num_positions in (10, 3000):  # grows between
        seen = positions[positions < num_positions]
        for full, table, still in zip(in_step, rotary.table(num_positions), (1, 0), strict=True):
            second_half = full[positions < num_positions, 0, 32:]
            assert torch.equal(second_half[:, :8], table[seen])
            assert (second_half[:, 8:] == still).all()


def test_a_long_context_is_held_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_attention, "PART_KEYS", 16)
    for query_lens, seq_lens in (([1], [130]), ([1, 9, 1, 70], [130, 40, 3, 90])):
        batch = make_batch(query_lens, seq_lens)
        query = draw(batch.num_tokens, 6, 32) * 32**-0.5
        kv = make_kv(batch, 2, 32)
        expected = ReferenceAttention(batch, KIND, None, BLOCK_SIZE)(query, kv["separate"])
        fast = FastAttention(batch, KIND, None, BLOCK_SIZE, torch.float32)
        results = {kv_layout: fast(query, kv[kv_layout]) for kv_layout in KV_LAYOUTS}
        assert all(torch.allclose(result, expected, atol=1e-5) for result in results.values())
        assert torch.equal(results["projection"], results["separate"])


def test_raw_rows_give_the_bits_of_a_split_cache() -> None:
    batch = make_batch([1, 9, 70], [130, 40, 90])
    query = draw(batch.num_tokens, 6, 144) * 144**-0.5
    kv = make_kv(batch, 2, 144)
    for attention in make_backends(batch, None)[:-1]:
        assert torch.equal(attention(query, kv["projection"]), attention(query, kv["separate"])), (
            attention
        )
