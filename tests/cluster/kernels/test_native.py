"""The native CPU kernels: each equals PyTorch's, and is built once or done without."""

from __future__ import annotations

import ctypes
import logging
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.kernels import build as native_build
from cluster.kernels.build import FLAGS, compile_library, native_library
from cluster.kernels.interface import KVWrite
from cluster.kernels.native import SOURCE, NativeKernels, native_kernels
from cluster.kernels.torch_kernels import TorchKernels
from engine.attention.native_attention import NativeAttention
from tests.support.engine.attention_cases import KIND, make_batch, make_kv

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
        kv = KVWrite(slots, keys, values) if num_keys else None
        weight = draw(num_queries + num_keys, head_dim)
        query = each.norm_and_rotate(qkv, num_queries, weight, 1e-6, rotation, kv)
        outputs.append((query, keys, values))
    for actual, expected in zip(*outputs, strict=True):
        assert_close(actual, expected)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64")
def test_narrower_vectors_give_the_same_bits(kernels: NativeKernels, tmp_path: Path) -> None:
    """A build without AVX-512 stands for an older processor."""
    library = tmp_path / "narrow.so"
    compile_library(SOURCE, library, [*FLAGS, "-mno-avx512f"])
    others = NativeKernels(ctypes.CDLL(str(library)))
    x, gate = draw(9, 100), draw(9, 40) * 5
    batch = make_batch([1, 9, 70], [130, 40, 90])
    query = draw(batch.num_tokens, 6, 144) * 144**-0.5
    results: list[list[Tensor]] = []
    for each in (kernels, others):
        attention = NativeAttention(each.attend, batch, KIND, None)
        results.append([attention(query, kv) for kv in make_kv(batch, 2, 144).values()])
        results[-1] += each.top_k_experts(gate, 4, draw(40))
        results[-1].append(each.linear(x, each.pack(draw(70, 100))))
        results[-1].append(each.rms_norm(x, draw(100), 1e-6))
        results[-1].append(each.gated_gelu(gate, draw(9, 40)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_threads_share_a_chunk_with_the_same_bits(kernels: NativeKernels) -> None:
    """Whatever it is cut into: a chunk of 9 queries, beside longer and shorter ones."""
    batch = make_batch([1, 9, 70], [130, 40, 90])
    query = draw(batch.num_tokens, 6, 144) * 144**-0.5
    results: list[list[Tensor]] = []
    num_before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5, 64):
            torch.set_num_threads(num_threads)
            attention = NativeAttention(kernels.attend, batch, KIND, None)
            results.append([attention(query, kv) for kv in make_kv(batch, 2, 144).values()])
    finally:
        torch.set_num_threads(num_before)
    for others in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], others, strict=True))


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


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where a library is kept that this test builds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    native_library.cache_clear()
    yield tmp_path / "briolette"
    native_library.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "one.cpp"
    path.write_text('extern "C" int one() { return 1; }')
    return path


def test_a_library_is_built_once(cache: Path, source: Path) -> None:
    built = []
    for _ in range(2):
        native_library.cache_clear()
        functions = native_library(source)
        assert functions is not None and functions.one() == 1
        (library,) = cache.iterdir()
        built.append(library.stat().st_mtime_ns)
    assert built[0] == built[1]


def test_the_compiler_may_be_several_words(
    monkeypatch: pytest.MonkeyPatch, cache: Path, source: Path
) -> None:
    monkeypatch.setenv("CXX", "env LC_ALL=C g++")
    assert native_library(source) is not None


@pytest.mark.parametrize("base", ["", "relative"])
def test_without_an_absolute_cache_home_the_users_own_is_taken(
    monkeypatch: pytest.MonkeyPatch, cache: Path, source: Path, tmp_path: Path, base: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert native_library(source) is not None
    assert len(list((tmp_path / "home/.cache/briolette").iterdir())) == 1
    assert not list((tmp_path / "here").iterdir())


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", home)


def open_quote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "'g++")


def endless_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "TIMEOUT_S", 0.2)
    monkeypatch.setenv("CXX", "sh -c 'exec sleep 60'")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_compiler, "apt-get install g++"),
        (no_home, "home directory"),
        (open_quote, "quotation"),
        (endless_compiler, "timed out"),
    ],
)
def test_what_cannot_be_built_is_done_without_and_said_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cache: Path,
    source: Path,
    spoil: Callable[[pytest.MonkeyPatch], None],
    words: str,
) -> None:
    spoil(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert native_library(source) is None and native_library(source) is None
    (record,) = caplog.records
    assert words in record.getMessage()


def test_a_wrong_dtype_never_reaches_the_cpp_side(kernels: NativeKernels) -> None:
    with pytest.raises(AssertionError):
        kernels.rms_norm(draw(3, 16).bfloat16(), None, 1e-6)
    with pytest.raises(AssertionError):
        kernels.linear(draw(3, 16), kernels.pack(draw(4, 16).double()))
