"""The whole engine on one GPU, in the true shape of the 26B: `python -m bench.gpu_engine`.

Needs torch with CUDA and this repository, nothing else: weights are random and made on the card
(fewer layers where memory is short), and Ray, gRPC and tokenizers aren't touched. It checks first
that the card computes what the CPU computes, then measures tokens/s of 1, 8 and 16 streams against
what the memory bandwidth of this card allows, and against transformers' `generate` where
transformers is installed. `--tiny` runs it all in a small shape, on a CPU too.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from bench.gpu_check import check_correctness
from bench.gpu_shapes import (
    CONFIG_26B,
    CONFIG_TINY,
    RandomCheckpoint,
    build_engine,
    random_prompts,
)
from bench.lib.card import report, table
from bench.lib.drive import drive
from bench.lib.timing import Timing
from cluster.spec import AttentionKind, ModelSpec

PROMPT_LEN, NUM_TOKENS = 128, 64
MEMORY_SHARE = 0.85  # of the free memory, for weights


@dataclass(frozen=True, slots=True)
class Target:
    """Where to run, and the shape."""

    device: torch.device
    dtype: torch.dtype
    config: dict[str, Any]

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec.from_config(self.config)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Check, measure, print the card, return the JSON object."""
    args = _arguments(argv)
    target = _target(args)
    if target is None:
        print("bench.gpu_engine needs an NVIDIA GPU and torch with CUDA; `--tiny` runs on a CPU.")
        return report("gpu-engine", {"not_measured": "no GPU"}, [], [], keep=False)
    torch.backends.cuda.matmul.allow_tf32 = False
    results: dict[str, Any] = {"device": _device_name(target.device)}
    checks = check_correctness(target.device)
    card = [f"on {results['device']}"]
    if all(check.ok for check in checks):
        speeds, more_card = measure(target, args)
        results |= speeds
        card += ["", *more_card]
    else:
        card.append("What it computes is wrong: no speed is measured.")
    return report("gpu-engine", results, checks, card, num_threads=1, keep=args.keep)


def measure(target: Target, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Tokens/s of ours and of transformers, one after the other: both don't fit at once."""
    spec = target.spec
    bandwidth = copy_bandwidth(target.device, 1 << (24 if args.tiny else 30))
    ours = _briolette(target, args)
    _free(target.device)
    theirs, reason = _transformers(target, args)
    rows, speeds = [], {}
    for n in args.streams:
        bound = n * bandwidth / bytes_per_step(spec, n, PROMPT_LEN + args.tokens // 2, target.dtype)
        peer = theirs.get(n)
        speeds[str(n)] = {
            "decode_tok_s": round(ours[n].decode_tok_s, 1),
            "output_tok_s": round(ours[n].output_tok_s, 1),
            "roofline_tok_s": round(bound, 1),
            "share_of_roofline": round(ours[n].decode_tok_s / bound, 4),
            "transformers_decode_tok_s": None if peer is None else round(peer.decode_tok_s, 1),
        }
        rows.append(
            [
                str(n),
                f"{ours[n].decode_tok_s:.1f}",
                f"{bound:.1f}",
                f"{ours[n].decode_tok_s / bound:.1%}",
                "-" if peer is None else f"{peer.decode_tok_s:.1f}",
            ]
        )
    results = {
        "num_layers": spec.num_layers,
        "dtype": str(target.dtype).removeprefix("torch."),
        "copy_gb_s": round(bandwidth / 1e9, 1),
        "streams": speeds,
        "transformers_not_measured": reason,
    }
    title = f"{spec.num_layers} layers, {results['dtype']}, copies at {results['copy_gb_s']} GB/s"
    header = ["streams", "tokens/s decoding", "bandwidth allows", "share", "transformers"]
    card = [title, *table(header, rows)]
    return results, card if reason is None else [*card, f"transformers: {reason}", ""]


def bytes_per_step(spec: ModelSpec, num_streams: int, context: int, dtype: torch.dtype) -> float:
    """What a decode step must read at least: each weight in use once, and the KV cache.

    The distinct experts hit are those of uniform routing: E (1 - (1 - k/E)^n).
    """
    hidden = spec.hidden_size
    num_elements = float(spec.vocab_size * hidden)  # the head
    for layer in spec.layers:
        heads = spec.num_attention_heads * layer.head_dim
        kv_heads = layer.num_kv_heads * layer.head_dim
        num_elements += hidden * (2 * heads + kv_heads * (1 if layer.k_eq_v else 2))
        num_elements += 3 * hidden * layer.intermediate_size
        hit = spec.num_experts * (1 - (1 - spec.top_k_experts / spec.num_experts) ** num_streams)
        num_elements += hit * 3 * hidden * spec.moe_intermediate_size + hidden * spec.num_experts
        is_global = layer.kind is AttentionKind.GLOBAL
        keys = context if is_global else min(context, spec.sliding_window)
        num_elements += num_streams * keys * layer.kv_elements("values")
    return num_elements * dtype.itemsize


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes read and written per second by a large copy: the best of a few."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    best = 0.0
    for _ in range(8):
        synchronise(device)
        start = time.perf_counter()
        destination.copy_(source)
        synchronise(device)
        best = max(best, 2 * num_bytes / (time.perf_counter() - start))
    return best


def _repeat(
    generate: Callable[[list[list[int]]], Timing],
    spec: ModelSpec,
    num_streams: int,
    args: argparse.Namespace,
) -> Timing:
    """The repetition whose decode speed is the median, after a warm-up."""
    generate(random_prompts(spec, num_streams, PROMPT_LEN, seed=0))
    timings = [
        generate(random_prompts(spec, num_streams, PROMPT_LEN, seed=1 + repeat))
        for repeat in range(args.repeats)
    ]
    middle = median(timing.decode_tok_s for timing in timings)
    return min(timings, key=lambda timing: abs(timing.decode_tok_s - middle))


def _briolette(target: Target, args: argparse.Namespace) -> dict[int, Timing]:
    checkpoint = RandomCheckpoint(target.device, target.dtype)
    engine = build_engine(target.spec, checkpoint, target.device, target.dtype)

    def generate(prompts: list[list[int]]) -> Timing:
        return drive(engine, prompts, args.tokens)

    return {n: _repeat(generate, target.spec, n, args) for n in args.streams}


def _transformers(target: Target, args: argparse.Namespace) -> tuple[dict[int, Timing], str | None]:
    """Its `generate` on the same shape, or why it couldn't be measured."""
    if args.alone:
        return {}, "not asked for"
    try:
        from transformers.models.gemma4 import Gemma4ForCausalLM, Gemma4TextConfig

        from bench.lib.peers import generate_timed, try_experts
    except ImportError as error:
        return {}, f"not installed ({error})"
    default = torch.get_default_dtype()
    settings = {key: value for key, value in target.config.items() if key != "model_type"}
    try:
        torch.set_default_dtype(target.dtype)
        with torch.device(target.device):
            model = Gemma4ForCausalLM(Gemma4TextConfig(**settings)).eval()
    except torch.OutOfMemoryError as error:
        return {}, f"doesn't fit: {error}"
    finally:
        torch.set_default_dtype(default)

    def generate(prompts: list[list[int]]) -> Timing:
        return generate_timed(model, prompts, args.tokens)

    timings = {}
    for n in args.streams:
        try_experts(model, random_prompts(target.spec, n, PROMPT_LEN, seed=0))
        timings[n] = _repeat(generate, target.spec, n, args)
    return timings, None


def _target(args: argparse.Namespace) -> Target | None:
    if args.tiny:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return Target(device, torch.float32, CONFIG_TINY)
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda")
    num_layers = args.layers or layers_that_fit(torch.cuda.mem_get_info(device)[0])
    return Target(device, torch.bfloat16, CONFIG_26B | {"num_hidden_layers": num_layers})


def layers_that_fit(free_bytes: int) -> int:
    """Take as many layers of the 26B as fit, in whole patterns of five sliding and a global one."""

    def weights_bytes(num_layers: int) -> float:
        spec = ModelSpec.from_config(CONFIG_26B | {"num_hidden_layers": num_layers})
        return bytes_per_step(spec, 10_000, 0, torch.bfloat16)  # so many hit every expert

    fitting = [n for n in range(6, 31, 6) if weights_bytes(n) <= MEMORY_SHARE * free_bytes]
    return max(fitting, default=6)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def synchronise(device: torch.device) -> None:
    """Wait for the card, where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_engine", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small shape in fp32; CPU will do")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--layers", type=int, help="of the 26B's 30; default: what fits")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
