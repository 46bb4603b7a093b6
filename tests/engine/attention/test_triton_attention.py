"""The GPU kernel, in Triton's interpreter: it equals the reference, and compiles without a GPU."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from engine.attention import triton_attention
from engine.attention.interface import KVTensors, ReferenceAttention
from engine.attention.planner import AttentionPlanner
from engine.attention.shared_kv import SharedKV
from engine.attention.triton_attention import TritonAttention, works
from tests.support.engine.attention_cases import BLOCK_SIZE, KIND, draw, make_batch, make_kv
from tests.support.engine.model_pairs import MakePair, prompt
from tests.support.engine.paged_driver import Sequence

SHARED_BYTES = 99 << 10  # that a program may have on a consumer card


def rounded(kv: KVTensors, dtype: torch.dtype) -> KVTensors:
    shared_kv = kv.shared_kv and SharedKV(kv.shared_kv.weight.to(dtype), kv.shared_kv.rotary)
    return KVTensors(None if kv.key is None else kv.key.to(dtype), kv.value.to(dtype), shared_kv)


@pytest.mark.parametrize(
    ("num_kv_heads", "window", "split_keys"),
    [(2, None, 16), (1, None, 10_000), (2, 7, 16), (1, 40, 16)],
)
def test_it_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, num_kv_heads: int, window: int | None, split_keys: int
) -> None:
    monkeypatch.setattr(triton_attention, "SPLIT_KEYS", split_keys)
    batch = make_batch([1, 9, 1, 70], [90, 40, 1, 70])
    kv = make_kv(batch, num_kv_heads, 64)
    query = draw(batch.num_tokens, 4, 64) * 64**-0.5
    expected = ReferenceAttention(batch, KIND, window, BLOCK_SIZE)(query, kv["separate"])
    attention = TritonAttention(batch, KIND, window, BLOCK_SIZE)
    assert torch.allclose(attention(query, kv["values"]), expected, atol=1e-5)
    assert torch.allclose(attention(query, kv["separate"]), expected, atol=1e-5)


@pytest.mark.parametrize("query_lens", [[1, 1], [9, 1]])
def test_heads_of_the_26b_in_half_precision(query_lens: list[int]) -> None:
    """bfloat16 is more than the interpreter can."""
    batch = make_batch(query_lens, [150, 33])
    kv = make_kv(batch, 2, 512)
    query = draw(batch.num_tokens, 16, 512) * 512**-0.5
    expected = ReferenceAttention(batch, KIND, None, BLOCK_SIZE)(query, kv["separate"])
    attention = TritonAttention(batch, KIND, None, BLOCK_SIZE)
    for kv_layout in ("values", "separate"):
        actual = attention(query.half(), rounded(kv[kv_layout], torch.float16)).float()
        assert torch.allclose(actual, expected, atol=5e-3), kv_layout


@pytest.mark.parametrize("cpu_kernels", ["torch"], indirect=True)  # native ones would come first
def test_in_a_model(cpu_kernels: str, make_pair: MakePair) -> None:
    pair = make_pair("26b")
    used: list[Any] = []

    def plan(*arguments: Any) -> TritonAttention:
        used.append(arguments)
        return TritonAttention(*arguments)

    def logits(**options: Any) -> list[torch.Tensor]:
        sequences, driver = [Sequence(prompt(n)) for n in (21, 53)], pair.driver(**options)
        driver.step([(sequences[0], 8)])
        driver.step([(sequences[0], 13), (sequences[1], 53)])
        driver.generate(sequences[1], 3)
        return [torch.stack(list(sequence.logits.values())) for sequence in sequences]

    expected = logits()
    model = pair.model
    model.attention = AttentionPlanner(model.kernels, model.dtype, batch_invariant=False, gpu=plan)
    for ours, reference in zip(logits(), expected, strict=True):
        assert torch.allclose(ours, reference, atol=1e-4)
    assert used
    used.clear()
    logits(kv_layout="projection")
    logits(kv_layout="separate")
    assert not used, "raw and split are PyTorch's, so that their bits are equal"


def test_a_gpu_where_it_does_not_work_is_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def works_for(head_dim: int) -> bool:
        return works(torch.device("cpu"), torch.float32, 4, (2, head_dim), None)

    with caplog.at_level(logging.WARNING):
        assert works_for(32)
        assert not caplog.records
        assert not works_for(48)

        def wrong(self: TritonAttention, query: torch.Tensor, kv: KVTensors) -> torch.Tensor:
            return query.flatten(1)

        def broken(self: TritonAttention, query: torch.Tensor, kv: KVTensors) -> torch.Tensor:
            raise RuntimeError("no compiler")

        for attend in (wrong, broken):
            monkeypatch.setattr(TritonAttention, "__call__", attend)
            assert not works_for(32)
    assert len(caplog.records) == 3


def test_it_compiles_for_a_consumer_card() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.engine.compile_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= SHARED_BYTES
