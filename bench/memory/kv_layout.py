"""Bytes of global KV per token, by layout: `python -m bench.memory.kv_layout`.

For each layout an engine computes the same prompt and stores it; then Redis is asked for the
length of each value of the global layers, and for what it needs to hold it (`MEMORY USAGE`). That
is more than in memory: where a prompt ends within a run of blocks, that part is a value too.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

from bench.lib.card import Check, pin, report, table
from bench.lib.drive import drive
from bench.lib.models import BenchModel, load_models, random_prompts
from bench.memory.kv_store import bare_server
from bench.memory.stored import Stored, stored_engine
from cluster.spec import AttentionKind, KVLayout
from cluster.store.redis import RedisAddress
from cluster.store.scripts import value_name
from cluster.store.value import HEADER_BYTES
from deployments.decoder.kv.block_store import kv_tensors
from engine.runner import ModelRunner

MODEL = "moe-50m"
PROMPT_LEN = 2048
TENANT = "default"
GLOBAL = AttentionKind.GLOBAL
COLUMNS = {
    "memory_bytes": "in memory",
    "payload_bytes": "payload in Redis",
    "usage_bytes": "MEMORY USAGE",
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the card, return the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    args = parser.parse_args(argv)
    pin(2)
    [model] = load_models([MODEL])
    results = {kv_layout: measure(model, kv_layout) for kv_layout in get_args(KVLayout)}
    return report("kv_layout", results, checks(results), card(results), keep=args.keep)


def measure(model: BenchModel, kv_layout: KVLayout) -> dict[str, float]:
    """Bytes per token of the global layers."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="briolette-")))
        address = stack.enter_context(bare_server(directory))
        options = {"engine.kv_layout": kv_layout, "engine.max_model_len": PROMPT_LEN + 16}
        stored = stack.enter_context(stored_engine(model, 2, address, options))
        drive(stored.engine, random_prompts(model, 1, PROMPT_LEN, seed=1), 1)
        stored.flush()
        payload_bytes, usage_bytes = bytes_in_redis(address)
        memory_bytes = bytes_in_memory(stored)
    return {
        "memory_bytes": memory_bytes,
        "payload_bytes": payload_bytes / PROMPT_LEN,
        "usage_bytes": usage_bytes / PROMPT_LEN,
    }


def bytes_in_memory(stored: Stored) -> float:
    """What the tensors of the global layers take for a token."""
    runner = stored.engine.runner
    assert isinstance(runner, ModelRunner)
    tensors = kv_tensors(runner)[GLOBAL]
    num_blocks, block_size = tensors[0].shape[:2]
    return sum(tensor.nbytes for tensor in tensors) / (num_blocks * block_size)


def bytes_in_redis(address: RedisAddress) -> tuple[int, int]:
    """Bytes of all values of global layers: payload, and what Redis counts for key and value."""
    payload = usage = 0
    with address.client() as client:
        for name in client.scan_iter(value_name(TENANT, GLOBAL.name[:1].encode()) + b"*"):
            payload += client.strlen(name) - HEADER_BYTES
            usage += client.memory_usage(name, samples=0) or 0
    return payload, usage


def checks(results: dict[str, Any]) -> list[Check]:
    """What the design promises of one row: half."""
    shares = {what: results["values"][what] / results["separate"][what] * 100 for what in COLUMNS}
    return [
        Check("one row / split, in memory", shares["memory_bytes"], "%", 50, at_least=False),
        Check(
            "one row / split, payload in Redis", shares["payload_bytes"], "%", 50, at_least=False
        ),
        Check("one row / split, MEMORY USAGE", shares["usage_bytes"], "%", 51, at_least=False),
    ]


def card(results: dict[str, Any]) -> list[str]:
    rows = [
        [kv_layout, *(f"{one[what]:.1f}" for what in COLUMNS)] for kv_layout, one in results.items()
    ]
    title = f"Bytes per token of the global layers, {MODEL} in fp32, {PROMPT_LEN} tokens"
    return [title, *table(["engine.kv_layout", *COLUMNS.values()], rows)]


if __name__ == "__main__":
    main()
