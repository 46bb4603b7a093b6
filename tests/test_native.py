"""The native CPU kernels: each equals PyTorch's, and is built once or done without."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.kernels import TorchKernels
from cluster.native import FLAGS, SOURCE, NativeKernels, native_kernels
from engine.native_attention import NativeAttention
from tests.test_attention import KIND, make_batch, make_kv

REFERENCE = TorchKernels()
SIZES = [(1, 64, 32), (3, 20, 33), (9, 48, 7), (130, 40, 65)]  # rows, inputs, outputs


@pytest.fixture
def kernels() -> NativeKernels:
    kernels = native_kernels()
    assert kernels is not None, "these tests need g++"
    return kernels


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("num_rows", "size", "num_outputs"), SIZES)
def test_products(kernels: NativeKernels, num_rows: int, size: int, num_outputs: int) -> None:
    x, weight, bias = draw(num_rows, size), draw(num_outputs, size), draw(num_outputs)
    packed = kernels.pack(weight)
    assert_close(kernels.linear(x, packed), x @ weight.T)
    assert_close(kernels.linear(x, packed, bias), x @ weight.T + bias)
    gate_up, down = draw(2 * num_outputs, size) * size**-0.5, draw(size, num_outputs)
    mixed = kernels.gated_mlp(x, kernels.pack_gated(gate_up), kernels.pack(down))
    assert_close(mixed, REFERENCE.gated_mlp(x, gate_up, down))


@pytest.mark.parametrize(("num_rows", "size", "num_outputs"), SIZES)
def test_rows_of_products_keep_their_bits(
    kernels: NativeKernels, num_rows: int, size: int, num_outputs: int
) -> None:
    x = draw(num_rows, size)
    weight, gate_up = kernels.pack(draw(num_outputs, size)), kernels.pack_gated(draw(34, size))
    down = kernels.pack(draw(size, 17))
    whole = kernels.linear(x, weight), kernels.gated_mlp(x, gate_up, down)
    for start in range(min(num_rows, 12)):
        for stop in range(start + 1, min(num_rows, start + 11)):
            some = x[start:stop]
            assert torch.equal(kernels.linear(some, weight), whole[0][start:stop])
            assert torch.equal(kernels.gated_mlp(some, gate_up, down), whole[1][start:stop])


@pytest.mark.parametrize("size", [1, 16, 20, 100])
def test_norms(kernels: NativeKernels, size: int) -> None:
    x, residual, weight, scale = draw(3, size), draw(3, size) + 1, draw(size), torch.tensor([0.3])
    expected = REFERENCE.rms_norm(x, weight, 1e-6)
    assert_close(kernels.rms_norm(x, weight, 1e-6), expected)
    assert_close(kernels.rms_norm(x, None, 1e-6), REFERENCE.rms_norm(x, None, 1e-6))
    assert_close(kernels.add_norm(residual, x, weight, 1e-6), residual + expected)
    assert_close(kernels.add_norm(residual, x, weight, 1e-6, scale), (residual + expected) * scale)


def test_gated_gelu_from_end_to_end_of_its_range(kernels: NativeKernels) -> None:
    gate = torch.cat((torch.linspace(-12, 12, 10_001), torch.tensor([-1e4, -0.0, 1e4, 1e30])))
    up = torch.full_like(gate, -1.5)
    assert_close(kernels.gated_gelu(gate, up), REFERENCE.gated_gelu(gate, up))


@pytest.mark.parametrize(("num_keys", "num_values"), [(0, 0), (2, 0), (2, 2)])
@pytest.mark.parametrize("head_dim", [8, 32])
def test_heads(kernels: NativeKernels, num_keys: int, num_values: int, head_dim: int) -> None:
    num_rows, num_queries = 5, 4
    qkv = draw(num_rows, num_queries + num_keys + num_values, head_dim)
    angles = draw(num_rows, 1, head_dim // 2)
    cos, sin = angles.cos(), angles.sin()
    rotation = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    slots = torch.tensor([7, 1, 4, 0, 9])
    outputs = []
    for each in (kernels, REFERENCE):
        keys, values = (torch.zeros(10, num_keys, head_dim) for _ in range(2))
        kv = (slots, keys, values) if num_keys else None
        weight = draw(num_queries + num_keys, head_dim)
        query = each.norm_and_rotate(qkv, num_queries, weight, 1e-6, rotation, kv)
        outputs.append((query, keys, values))
    for actual, expected in zip(*outputs, strict=True):
        assert_close(actual, expected)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64")
def test_narrower_vectors_give_the_same_bits(kernels: NativeKernels, tmp_path: Path) -> None:
    """As on a processor without AVX-512."""
    library = tmp_path / "narrow.so"
    narrow = [*FLAGS, "-mno-avx512f", "-shared", str(SOURCE), "-o", str(library)]
    subprocess.run([os.environ.get("CXX", "g++"), *narrow], check=True)
    others = NativeKernels(library)
    x, gate = draw(9, 100), draw(9, 40) * 5
    batch = make_batch([1, 9, 70], [130, 40, 90])
    query = draw(batch.num_tokens, 6, 144) * 144**-0.5
    results: list[list[Tensor]] = []
    for each in (kernels, others):
        attention = NativeAttention(each, batch, KIND, None)
        results.append([attention(query, kv) for kv in make_kv(batch, 2, 144).values()])
        results[-1] += each.top_k_experts(gate, 4, draw(40))
        results[-1].append(each.linear(x, each.pack(draw(70, 100))))
        results[-1].append(each.rms_norm(x, draw(100), 1e-6))
        results[-1].append(each.gated_gelu(gate, draw(9, 40)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("num_experts", [4, 16, 37])
def test_top_k_experts(kernels: NativeKernels, num_experts: int) -> None:
    scores, scale = draw(6, num_experts) * 3, draw(num_experts)
    ids, weights = kernels.top_k_experts(scores, 4, scale)
    expected_ids, expected_weights = REFERENCE.top_k_experts(scores, 4, scale)
    assert torch.equal(ids, expected_ids)
    assert_close(weights, expected_weights)


def test_equal_scores_go_to_the_lower_ids(kernels: NativeKernels) -> None:
    ids, weights = kernels.top_k_experts(torch.zeros(1, 20), 3, torch.ones(20))
    assert ids.tolist() == [[0, 1, 2]]
    assert_close(weights, torch.full((1, 3), 1 / 3))


def test_without_a_compiler_torch_does_the_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    native_kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert native_kernels() is None and native_kernels() is None
    finally:
        native_kernels.cache_clear()
    (record,) = caplog.records
    assert "apt-get install g++" in record.getMessage()


def test_it_is_built_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = []
    for _ in range(2):
        native_kernels.cache_clear()
        assert native_kernels() is not None
        (library,) = (tmp_path / "briolette").iterdir()
        built.append(library.stat().st_mtime_ns)
    native_kernels.cache_clear()
    assert built[0] == built[1]
