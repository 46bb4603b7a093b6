"""Attention of global layers on one GPU, one row beside split: `python -m bench.gpu_attention`.

Needs torch with CUDA, the Triton that comes with it, and this repository. The shape is that of the
26B's global layers, in bf16. It checks first that the kernel computes what PyTorch computes, then
measures one request's decode at contexts of 4K to 256K tokens, as a share of the memory bandwidth
of a copy, and a chunk of prefill. Every decode reads other blocks, in a CUDA graph, so neither the
L2 cache nor Python is measured. `--tiny` runs it all in a small shape, on a CPU in Triton's
interpreter.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.gpu_engine import copy_bandwidth, synchronise
from bench.lib.card import Check, report, table
from cluster.spec import AttentionKind, RopeSpec
from engine.attention.interface import KVTensors
from engine.attention.rotary import Rotary
from engine.attention.shared_kv import SharedKV
from engine.attention.torch_attention import FastAttention
from engine.batch import Batch

if TYPE_CHECKING:
    from engine.attention.triton_attention import TritonAttention

KIND, BLOCK_SIZE, SEED = AttentionKind.GLOBAL, 16, 5
ROPE = RopeSpec(theta=1e6, partial_rotary_factor=0.25)
CHUNK = 512  # tokens of a prefill step
GRAPH_CALLS = 16  # at most, that one replay repeats
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}  # relative, against PyTorch in fp32
KINDS = {"one row": True, "split": False}


@dataclass(frozen=True, slots=True)
class Shape:
    """What is measured, and where."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]  # contexts in tokens, ascending

    def token_bytes(self, shared_kv: bool) -> int:
        """Bytes of one token in a layer's cache."""
        return (1 if shared_kv else 2) * self.num_kv_heads * self.head_dim * self.dtype.itemsize


BIG = Shape(
    torch.device("cuda"), torch.bfloat16, 16, 2, 512, tuple(n << 10 for n in (4, 16, 64, 256))
)
TINY = Shape(torch.device("cpu"), torch.float32, 4, 1, 32, (64, 96))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Check, measure, print the card, return the JSON object."""
    args = _arguments(argv)
    has_gpu = torch.cuda.is_available()
    if not (has_gpu or args.tiny):
        print("bench.gpu_attention needs an NVIDIA GPU and torch with CUDA; `--tiny` does not.")
        return report("gpu-attention", {"not_measured": "no GPU"}, [], [], keep=False)
    if not has_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernel is imported
    shape = BIG
    if args.tiny:
        shape = replace(TINY, device=torch.device("cuda" if has_gpu else "cpu"))
    torch.backends.cuda.matmul.allow_tf32 = False
    checks = check_correctness(shape)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if shape.device.type == "cuda" else "CPU"
    }
    card = [f"on {results['device']}", ""]
    if all(check.ok for check in checks):
        measured, more_checks, more_card = measure(shape, args.repeats)
        results |= measured
        checks += more_checks
        card += more_card
    else:
        card.append("What it computes is wrong: no speed is measured.")
    return report("gpu-attention", results, checks, card, num_threads=1, keep=args.keep)


def check_correctness(shape: Shape) -> list[Check]:
    """Decodes, a prefill chunk and both together, with one row and split, against PyTorch."""
    checks = []
    for name, shared_kv in KINDS.items():
        errors = [
            relative_error(shape, shared_kv, query_lens, seq_lens)
            for query_lens, seq_lens in (
                ([1], [shape.lengths[0]]),
                ([1, 40, 1], [5, shape.lengths[0], 300]),
                ([1], [shape.lengths[-1]]),
            )
        ]
        limit = TOLERANCE[shape.dtype]
        checks.append(Check(f"{name}: error", max(errors), "", limit, at_least=False))
    return checks


def relative_error(
    shape: Shape, shared_kv: bool, query_lens: list[int], seq_lens: list[int]
) -> float:
    """Error of the kernel's output against PyTorch in fp32 from the same cache."""
    width = -(-max(seq_lens) // BLOCK_SIZE)
    kv = make_kv(shape, shared_kv, width * len(seq_lens))
    order = torch.randperm(width * len(seq_lens), generator=torch.Generator().manual_seed(SEED))
    batch = make_batch(query_lens, seq_lens, order.view(-1, width).to(shape.device))
    query = make_query(shape, batch.num_tokens)
    ours = _kernel(batch)(query, kv).float()
    exact = FastAttention(batch, KIND, None, BLOCK_SIZE, torch.float32)(query.float(), _fp32(kv))
    return float((ours - exact).norm() / exact.norm())


def measure(shape: Shape, repeats: int) -> tuple[dict[str, Any], list[Check], list[str]]:
    """Decode by length and kind, and the prefill of a chunk at the end of the longest context."""
    bandwidth = copy_bandwidth(shape.device, 1 << (30 if shape is BIG else 24))
    seconds = {name: decode_seconds(shape, shared_kv, repeats) for name, shared_kv in KINDS.items()}
    rows: list[list[str]] = []
    results: dict[str, dict[str, Any]] = {}
    for length in shape.lengths:
        shares = {
            name: length * shape.token_bytes(shared_kv) / seconds[name][length] / bandwidth
            for name, shared_kv in KINDS.items()
        }
        faster = seconds["split"][length] / seconds["one row"][length]
        results[str(length)] = {
            name: {"us": round(seconds[name][length] * 1e6, 1), "share": round(shares[name], 4)}
            for name in KINDS
        } | {"split_over_one_row": round(faster, 3)}
        times = [f"{seconds[name][length] * 1e6:.1f} us, {shares[name]:.0%}" for name in KINDS]
        rows.append([f"{length:,}", *times, f"{faster:.2f}"])
    prefill = {name: prefill_tflops(shape, shared_kv, repeats) for name, shared_kv in KINDS.items()}
    longest = results[str(shape.lengths[-1])]
    checks = [
        Check("one row: share of a copy's bandwidth", longest["one row"]["share"], "", 0.7),
        Check("split: share of a copy's bandwidth", longest["split"]["share"], "", 0.7),
        Check("split's time over one row's", longest["split_over_one_row"], "x", 1.6),
    ]
    if shape is not BIG:
        checks = []  # promised for the true shape alone
    header = ["context", *(f"{name}: time, share" for name in KINDS), "times faster"]
    card = [f"one decode, copies at {bandwidth / 1e9:.0f} GB/s", *table(header, rows)]
    card += [f"prefill, {name}: {tflops:.2f} TFLOP/s" for name, tflops in prefill.items()]
    rounded = {name: round(tflops, 3) for name, tflops in prefill.items()}
    more = {"copy_gb_s": round(bandwidth / 1e9, 1), "decode": results, "prefill_tflops": rounded}
    return more, checks, [*card, ""]


def decode_seconds(shape: Shape, shared_kv: bool, repeats: int) -> dict[int, float]:
    """Measure one request's decode by context length; the median of some replays."""
    num_blocks = shape.lengths[-1] // BLOCK_SIZE
    kv, query = make_kv(shape, shared_kv, num_blocks), make_query(shape, 1)
    seconds = {}
    for length in shape.lengths:
        tables = torch.split(torch.arange(num_blocks, device=shape.device), length // BLOCK_SIZE)
        tables = tables[: min(GRAPH_CALLS, num_blocks * BLOCK_SIZE // length)]
        attentions = [_kernel(make_batch([1], [length], blocks[None])) for blocks in tables]

        def calls(attentions: list[TritonAttention] = attentions) -> None:
            for attention in attentions:
                attention(query, kv)

        seconds[length] = _time(calls, shape.device, repeats) / len(attentions)
    return seconds


def prefill_tflops(shape: Shape, shared_kv: bool, repeats: int) -> float:
    """Measure the last prefill chunk of the longest context."""
    length = shape.lengths[-1]
    chunk = min(CHUNK, length)
    kv, query = make_kv(shape, shared_kv, length // BLOCK_SIZE), make_query(shape, chunk)
    table = torch.arange(length // BLOCK_SIZE, device=shape.device)[None]
    attention = _kernel(make_batch([chunk], [length], table))
    seconds = _time(lambda: attention(query, kv), shape.device, repeats)
    flops = 4.0 * chunk * (length - chunk / 2) * shape.num_heads * shape.head_dim
    return flops / seconds / 1e12


def make_kv(shape: Shape, shared_kv: bool, num_blocks: int) -> KVTensors:
    """Random values; keys of a size that gives scores the usual spread."""
    generator = torch.Generator(shape.device).manual_seed(SEED)

    def draw(scale: float) -> Tensor:
        size = num_blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim
        empty = torch.empty(size, device=shape.device, dtype=shape.dtype)
        return empty.normal_(0.0, scale, generator=generator)

    if not shared_kv:
        return KVTensors(draw(1.0), draw(1.0))
    rotary = Rotary(ROPE, shape.head_dim, shape.device, shape.dtype)
    weight = torch.ones(shape.head_dim, device=shape.device, dtype=shape.dtype)
    return KVTensors(None, draw(1.0), SharedKV(weight * 0.5, rotary))


def make_query(shape: Shape, num_tokens: int) -> Tensor:
    generator = torch.Generator(shape.device).manual_seed(SEED + 1)
    size = num_tokens, shape.num_heads, shape.head_dim
    query = torch.empty(size, device=shape.device, dtype=shape.dtype)
    return query.normal_(0.0, shape.head_dim**-0.5, generator=generator)


def make_batch(query_lens: list[int], seq_lens: list[int], table: Tensor) -> Batch:
    """Requests with these blocks [num_requests, width]."""
    spans = zip(query_lens, seq_lens, strict=True)
    positions = torch.cat([torch.arange(end - num, end) for num, end in spans]).to(table.device)
    return Batch(positions, positions, query_lens, seq_lens, {KIND: table}, {}, positions[:0])


def _kernel(batch: Batch) -> TritonAttention:
    from engine.attention.triton_attention import TritonAttention

    return TritonAttention(batch, KIND, None, BLOCK_SIZE)


def _fp32(kv: KVTensors) -> KVTensors:
    shared_kv = kv.shared_kv
    if shared_kv is not None:
        frequencies, weight = shared_kv.rotary.frequencies, shared_kv.weight.float()
        rotary = Rotary(ROPE, len(weight), frequencies.device, torch.float32)
        shared_kv = SharedKV(weight, rotary)
    return KVTensors(None if kv.key is None else kv.key.float(), kv.value.float(), shared_kv)


def _time(calls: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the calls: the median of some replays of a graph of them."""
    calls()  # compiles, and works out what a step's layers share
    if device.type != "cuda":
        return median(_seconds(calls, device) for _ in range(repeats))
    graph = torch.cuda.CUDAGraph()
    synchronise(device)
    with torch.cuda.graph(graph):
        calls()
    replay: Callable[[], None] = graph.replay
    replay()
    return median(_seconds(replay, device) for _ in range(repeats))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """On a GPU, until all that was asked of it is done."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_attention", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small shape in fp32; a CPU will do")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
