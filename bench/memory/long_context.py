"""128K tokens of context: memory as calculated, windows freed on the way, sliding layers' speed.

`python -m bench.memory.long_context` runs a small random model. One prompt of 128K tokens goes
through a KV cache of exactly the calculated size; then the sliding layers alone prefill 8K and 128K
tokens in turn, since what a token costs there mustn't grow with the context.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, cast

import psutil
import torch

from bench.gpu_shapes import RandomCheckpoint, random_prompts
from bench.lib.card import Check, pin, report, table
from cluster.checkpoint import Checkpoint
from cluster.spec import AttentionKind, ModelSpec
from engine.cache.block_hash import BlockHasher
from engine.cache.kv_cache_group import sliding_blocks
from engine.cache.kv_sizing import kv_bytes_per_block, min_kv_bytes, size_kv_cache
from engine.core import EngineCore
from engine.limits import SpecLimits
from engine.model.model import GemmaDecoder
from engine.request import SamplingParams
from engine.runner import ModelRunner

BUDGET = 512  # tokens of a step, as the engine's default
SHORT, LONG = 8 * 1024, 128 * 1024
NUM_ANSWER = 16  # tokens after a prompt
OTHER_BYTES = 256  # that a token may take beside its KV: a fortieth of the 26B's
FP32 = torch.float32

SMALL: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,  # five slide, the last is global
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "global_head_dim": 32,
    "attention_k_eq_v": True,
    "sliding_window": 512,
    "max_position_embeddings": LONG + NUM_ANSWER,
    "hidden_size_per_layer_input": 0,
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the card, return the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=LONG, help="length of the long prompt")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of a short and a long prompt")
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    args = parser.parse_args(argv)
    pin(2)
    torch.set_num_threads(2)
    spec = ModelSpec.from_config(SMALL)
    memory = measure_memory(spec, args.tokens)
    sliding = measure_sliding(spec, args.tokens, args.repeats)
    checks = [
        Check("KV cache", memory.kv_bytes / memory.calculated_bytes, "of calculated", 1.0, False),
        Check("all else in memory", memory.other_bytes, "B/token", OTHER_BYTES, False),
        Check("sliding blocks in use", memory.most_sliding, "blocks", memory.window_blocks, False),
        Check("sliding token at 128K", sliding["ratio"], "of one at 8K", 1.1, False),
    ]
    results = {"memory": asdict(memory), "sliding": sliding}
    return report("long_context", results, checks, card(memory, sliding), keep=args.keep)


@dataclass(frozen=True, slots=True)
class Memory:
    """What a prompt took in a KV cache of exactly the size calculated for it."""

    num_tokens: int
    calculated_bytes: int
    kv_bytes: int  # of the tensors
    unfreed_bytes: int  # that they would have if nothing were freed behind windows
    grown_bytes: int  # of the whole process, at most
    window_blocks: int  # that a request needs to go on, one token at a time
    most_sliding: int  # blocks referenced after a step
    most_global: int
    prefill_s: float

    @property
    def other_bytes(self) -> float:
        """By which the process grew for each token, beside the KV: its id, hashes, rotations."""
        return max(0, self.grown_bytes - self.kv_bytes) / self.num_tokens


def measure_memory(spec: ModelSpec, num_tokens: int) -> Memory:
    """Run one prompt and its answer through the smallest KV cache for both."""
    model = random_decoder(spec)
    prefill(model, 4 * BUDGET)  # code and work memory come before
    process = psutil.Process()
    before_bytes = most_bytes = process.memory_info().rss
    length = num_tokens + NUM_ANSWER
    engine = make_engine(model, length)
    runner = cast(ModelRunner, engine.runner)
    started, prefill_s, most_sliding, most_global = time.perf_counter(), 0.0, 0, 0
    start(engine, num_tokens, NUM_ANSWER)
    while engine.has_work:
        if engine.step() and not prefill_s:
            prefill_s = time.perf_counter() - started
        used = engine.stats().num_used_blocks
        most_sliding = max(most_sliding, used[AttentionKind.SLIDING])
        most_global = max(most_global, used.get(AttentionKind.GLOBAL, 0))
        most_bytes = max(most_bytes, process.memory_info().rss)
    block_size = engine.kv.block_size
    per_block = {k: kv_bytes_per_block(spec, k, block_size, FP32) for k in AttentionKind}
    return Memory(
        num_tokens=num_tokens,
        calculated_bytes=min_kv_bytes(spec, length, dtype=FP32, max_num_batched_tokens=BUDGET),
        kv_bytes=sum(t.nbytes for tensors in runner.kv_tensors.values() for t in tensors.stored),
        unfreed_bytes=sum(per_block.values()) * -(-length // block_size),
        grown_bytes=most_bytes - before_bytes,
        window_blocks=sliding_blocks(spec.sliding_window, 1, block_size, length),
        most_sliding=most_sliding,
        most_global=most_global,
        prefill_s=prefill_s,
    )


def measure_sliding(spec: ModelSpec, num_tokens: int, num_repeats: int) -> dict[str, float]:
    """What a token costs the sliding layers in a prompt of 8K, and in the last 8K of a long one.

    Medians over the steps of both, which take turns: others compute on the machine too.
    """
    model = random_decoder(sliding_alone(spec))
    prefill(model, SHORT)
    short_s: list[float] = []
    long_s: list[float] = []
    for _ in range(num_repeats):
        short_s += prefill(model, SHORT)
        long_s += prefill(model, num_tokens)[-(SHORT // BUDGET) :]
    return {
        "short_us": median(short_s) / BUDGET * 1e6,
        "long_us": median(long_s) / BUDGET * 1e6,
        "ratio": median(long_s) / median(short_s),
    }


def sliding_alone(spec: ModelSpec) -> ModelSpec:
    """The model without its global layers, whose work and memory grow with the context."""
    layers = (layer for layer in spec.layers if layer.kind is AttentionKind.SLIDING)
    return replace(spec, layers=tuple(layers))


def random_decoder(spec: ModelSpec) -> GemmaDecoder:
    checkpoint = cast(Checkpoint, RandomCheckpoint(torch.device("cpu"), FP32))
    return GemmaDecoder.load(spec, checkpoint)


def make_engine(model: GemmaDecoder, max_model_len: int) -> EngineCore:
    """An engine with no more KV cache than one request of that length needs."""
    kv_bytes = min_kv_bytes(model.spec, max_model_len, dtype=FP32, max_num_batched_tokens=BUDGET)
    kv = size_kv_cache(
        model.spec, kv_bytes, max_model_len, dtype=FP32, max_num_batched_tokens=BUDGET
    )
    return EngineCore(
        ModelRunner(model, kv, None),
        kv,
        spec_limits=SpecLimits.from_spec(model.spec, max_model_len),
        hasher=BlockHasher(kv.block_size, "random"),
        max_num_batched_tokens=BUDGET,
        max_num_seqs=1,
    )


def start(engine: EngineCore, num_tokens: int, num_answer: int = 1) -> None:
    """Ask for so many tokens after a random prompt."""
    spec = cast(ModelRunner, engine.runner).model.spec
    (prompt_ids,) = random_prompts(spec, 1, num_tokens, seed=0)
    sampling = SamplingParams(temperature=0.0, max_tokens=num_answer, ignore_eos=True)
    engine.add(request_id="long", prompt_ids=prompt_ids, sampling=sampling)


def prefill(model: GemmaDecoder, num_tokens: int) -> list[float]:
    """Seconds of each step of a random prompt."""
    engine = make_engine(model, num_tokens + 1)
    start(engine, num_tokens)
    times = [time.perf_counter()]
    while engine.has_work:
        engine.step()
        times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


def card(memory: Memory, sliding: dict[str, float]) -> list[str]:
    """Both measurements for people."""
    rows = [
        ["calculated for the KV cache", f"{memory.calculated_bytes / 1e6:.1f} MB"],
        ["its tensors", f"{memory.kv_bytes / 1e6:.1f} MB"],
        ["the process grew by", f"{memory.grown_bytes / 1e6:.1f} MB"],
        ["without freeing behind windows", f"{memory.unfreed_bytes / 1e6:.1f} MB"],
        [
            "sliding blocks in use, of a window's",
            f"{memory.most_sliding} of {memory.window_blocks}",
        ],
        ["global blocks in use", f"{memory.most_global:,}"],
        ["prefill", f"{memory.num_tokens / memory.prefill_s:,.0f} tokens/s"],
    ]
    speeds = [
        ["a prompt of 8K", f"{sliding['short_us']:.1f} µs"],
        [f"the last 8K of {memory.num_tokens:,}", f"{sliding['long_us']:.1f} µs"],
    ]
    return [
        *table(
            [f"{memory.num_tokens:,} tokens through five sliding layers and a global one", ""], rows
        ),
        *table(["the sliding layers alone, prefill of a token in", ""], speeds),
    ]


if __name__ == "__main__":
    main()
