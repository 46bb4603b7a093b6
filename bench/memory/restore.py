"""TTFT of long prompts through the whole cluster: cold, from memory, from Redis after a restart.

`python -m bench.memory.restore` starts a cluster with the demo model, sends each prompt over gRPC
twice, ends the cluster and its Redis server, starts everything again and sends the prompts once
more. The raw rate is that of the same server over the same kind of socket, without us.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from bench.lib.card import Check, pin, report, table
from bench.lib.models import BenchModel, load_models, random_prompts
from bench.lib.ours import Cluster
from bench.lib.peers import NotMeasured
from bench.memory.raw_wire import raw_read_rate
from cluster.store.redis import RedisAddress
from cluster.store.redis_server import SOCKET
from deployments.gateway.scrape_targets import FILE

LENGTHS = (4096, 16_384, 32_768)
CONTEXT, NUM_TOKENS = 32_768, 16  # the answer is within the context too
NUM_PROMPTS = 3
KV_BYTES = 1 << 30
RAW_VALUES, VALUE_BYTES = 16, 2 << 20
SETTLE_S, WRITTEN_S = 0.5, 60.0
MARGIN, OVERHEAD_MS = 1.3, 30.0  # of a restore, over what the link takes

Prompts = dict[int, list[list[int]]]  # by length


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the card, return the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of prompts")
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS, help="of each length")
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    args = parser.parse_args(argv)
    pin(2)
    [model] = load_models(["demo"])
    prompts = {
        length: random_prompts(model, args.prompts, min(length, CONTEXT - NUM_TOKENS), seed=length)
        for length in args.lengths
    }
    results: dict[str, Any] = {}
    try:
        results = measure(model, prompts)
    except NotMeasured as reason:
        results["not_measured"] = str(reason)
    return report("restore", results, checks(results), card(results), keep=args.keep)


def measure(model: BenchModel, prompts: Prompts) -> dict[str, Any]:
    """Both lives of the cluster. Raises NotMeasured when it doesn't start."""
    with tempfile.TemporaryDirectory(prefix="briolette-") as directory:
        data_dir = Path(directory) / "redis"
        options = {
            "engine.max_model_len": CONTEXT,
            "engine.kv_bytes": KV_BYTES,
            "store.data_dir": str(data_dir),
        }
        with closing(Cluster(model, options)) as cluster:
            before = first_life(model, cluster, prompts)
            wait_until_written(cluster)
        with closing(Cluster(model, options)) as cluster:
            after = second_life(model, cluster, prompts)
            address = RedisAddress(f"unix://{data_dir / SOCKET}")
            values = [os.urandom(VALUE_BYTES)] * RAW_VALUES
            rate = raw_read_rate(address, values)
    lengths = {str(length): before[length] | after[length] for length in prompts}
    return {"raw_bytes_per_s": rate, "lengths": lengths}


def first_life(model: BenchModel, cluster: Cluster, prompts: Prompts) -> dict[int, dict[str, Any]]:
    """Each prompt computed, and then again, when memory has all of it."""
    get_warm(model, cluster, seed=1)
    found: dict[int, dict[str, Any]] = {}
    for length, some in prompts.items():
        cold_ms = [ttft_ms(cluster, prompt) for prompt in some]
        before = steps(cluster)
        memory_ms = [ttft_ms(cluster, prompt) for prompt in some]
        step_ms, num_steps = steps_since(before, cluster)
        before = steps(cluster)
        for prompt in some:
            cluster.generate([prompt], 1)
        first_step_ms, _ = steps_since(before, cluster)
        found[length] = {
            "cold_ms": cold_ms,
            "memory_ms": memory_ms,
            "step_ms": step_ms,
            "first_step_ms": first_step_ms,  # computes up to a block of tokens, not one
            "memory_steps": num_steps / len(some) - (NUM_TOKENS - 1),  # each other token takes one
        }
    return found


def second_life(model: BenchModel, cluster: Cluster, prompts: Prompts) -> dict[int, dict[str, Any]]:
    """Each prompt once, when only Redis has it; and the bytes that came from there."""
    get_warm(model, cluster, seed=2)
    found: dict[int, dict[str, Any]] = {}
    for length, some in prompts.items():
        times, num_bytes = [], []
        for prompt in some:
            before = bytes_read(cluster)
            times.append(ttft_ms(cluster, prompt))
            num_bytes.append(bytes_read(cluster) - before)
        found[length] = {"redis_ms": times, "redis_bytes": num_bytes}
    return found


def get_warm(model: BenchModel, cluster: Cluster, seed: int) -> None:
    """An unrelated prompt, of which the store knows nothing."""
    cluster.generate(random_prompts(model, 1, 700, seed), NUM_TOKENS)


def ttft_ms(cluster: Cluster, prompt: list[int]) -> float:
    """Measure TTFT as a client over gRPC sees it."""
    return cluster.generate([prompt], NUM_TOKENS).ttft_s * 1e3


def steps(cluster: Cluster) -> tuple[float, float]:
    """Seconds in the engine's steps, and their number, since the start."""
    name = "briolette_step_duration_seconds"
    return metric(cluster, f"{name}_sum"), metric(cluster, f"{name}_count")


def steps_since(before: tuple[float, float], cluster: Cluster) -> tuple[float, float]:
    """Milliseconds of the mean step, and the number of steps, since `before`."""
    seconds, num_steps = (b - a for a, b in zip(before, steps(cluster), strict=True))
    return seconds / num_steps * 1e3, num_steps


def wait_until_written(cluster: Cluster) -> None:
    """Until nothing waits to be written and nothing has been for a while."""
    give_up_at, last = time.monotonic() + WRITTEN_S, -1.0
    while time.monotonic() < give_up_at:
        written = metric(cluster, "briolette_kv_store_bytes_total", direction="written")
        if written == last and metric(cluster, "briolette_kv_store_queue_bytes") == 0:
            return
        last = written
        time.sleep(SETTLE_S)


def bytes_read(cluster: Cluster) -> float:
    """Payload that came from Redis since the cluster's start."""
    return metric(cluster, "briolette_kv_store_bytes_total", direction="read")


def metric(cluster: Cluster, name: str, **labels: str) -> float:
    """A sample of the decoder's /metrics, summed over the labels that aren't given."""
    groups = json.loads((cluster.state_dir / FILE).read_text())
    [target] = [group["targets"][0] for group in groups if group["labels"]["part"] == "decoder"]
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as page:
        text = page.read().decode()
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def checks(results: dict[str, Any]) -> list[Check]:
    """What the design promises of each length; nothing was measured where the cluster failed."""
    if "lengths" not in results:
        return [Check("TTFT from Redis", None, "ms", OVERHEAD_MS, at_least=False)]
    found = []
    for length, one in results["lengths"].items():
        cold, memory, redis = (median(one[f"{w}_ms"]) for w in ("cold", "memory", "redis"))
        in_steps = memory / one["step_ms"]
        link_ms = median(one["redis_bytes"]) / results["raw_bytes_per_s"] * 1e3
        allowed_ms = MARGIN * link_ms + OVERHEAD_MS
        found += [
            Check(f"{length} tokens from Redis: TTFT", redis, "ms", allowed_ms, at_least=False),
            Check(
                f"{length} tokens from memory: steps to the first token",
                one["memory_steps"],
                "",
                2,
                at_least=False,
            ),
            Check(
                f"{length} tokens from memory: TTFT, in steps of the mean length",
                in_steps,
                "steps",
                2,
                at_least=False,
            ),
        ]
        if length == str(CONTEXT):
            found.append(Check(f"{length} tokens: cold / from Redis", cold / redis, "x", 5))
    return found


def card(results: dict[str, Any]) -> list[str]:
    if "lengths" not in results:
        return [f"NOT MEASURED: {results['not_measured']}", ""]
    rows = []
    for length, one in results["lengths"].items():
        times = [f"{median(one[f'{w}_ms']):.0f}" for w in ("cold", "memory", "redis")]
        size = median(one["redis_bytes"]) / 1e6
        link = size * 1e9 / results["raw_bytes_per_s"]
        in_steps = [f"{one[f'{which}_ms']:.1f}" for which in ("first_step", "step")]
        rows.append([length, *times, *in_steps, f"{size:.1f}", f"{link:.1f}"])
    times = ["cold", "from memory", "from Redis", "its first step", "a step"]
    header = ["prompt tokens", *times, "MB", "raw link"]
    title = "Demo model, whole cluster over gRPC: TTFT in ms, medians; from Redis after down and up"
    rate = f"The raw link gives {results['raw_bytes_per_s'] / 1e9:.2f} GB/s."
    return [title, *table(header, rows), rate, ""]


if __name__ == "__main__":
    main()
