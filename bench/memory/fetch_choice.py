"""Is the choice between fetching and computing right? On a link of 1 Gbit/s, with the 26B's KV.

`python -m bench.memory.fetch_choice` puts Redis behind a shaped link, into a network namespace of
its own. The blocks of a small random model are padded until a token's KV and a window have the
26B's size, so that a short prompt is computed faster and a long one fetched faster. Each prompt is
timed both ways, and then left to the store, which knows the rates that it has measured itself.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

from bench.lib.card import Check, pin, report, table
from bench.lib.drive import drive
from bench.lib.models import BenchModel, load_models, random_prompts
from bench.lib.peers import NotMeasured
from bench.memory import shaped_link
from bench.memory.kv_store import bare_command, wait_for_answer
from bench.memory.raw_wire import raw_read_rate
from bench.memory.stored import Stored, stored_engine
from cluster.spec import AttentionKind
from cluster.store.redis import RedisAddress

MODEL = "wide-window"
LENGTHS = (1024, 2048, 8192, 16_384)
NUM_ROUNDS = 2
NUM_THREADS = 2
PORT, BITS_PER_S, TIMEOUT_S = 6379, 1e9, 30.0
# Of a token's KV in all layers of the 26B, bf16, one row; a window has 1024 tokens, as it has here.
TOKEN_BYTES = {AttentionKind.GLOBAL: 10_240, AttentionKind.SLIDING: 204_800}
STORE_BYTES = 4 << 30
OPTIONS = {
    "engine.kv_bytes": 64 << 20,  # unpadded
    "engine.max_num_seqs": 1,
    "engine.checkpoint_blocks": 0,  # windows at the ends of prompts alone: each has 210 MB
    "store.queue_bytes": 2 << 30,
    "store.tenant_bytes": STORE_BYTES,
    "store.timeout_s": TIMEOUT_S,
}
CLOSE_CALL = 1.1  # where one way takes at most this times the other, both are right
VALUE_BYTES, RAW_VALUES = 2 << 20, 16
COMPUTE, FETCH, CHOICE = "compute", "fetch", "choice"

Prompts = dict[int, list[int]]  # by length


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the card, return the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of prompts")
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    args = parser.parse_args(argv)
    pin(NUM_THREADS)
    [model] = load_models([MODEL])
    prompts = {n: random_prompts(model, 1, n, seed=n)[0] for n in args.lengths}
    try:
        results = measure(model, prompts, args.rounds)
    except NotMeasured as reason:
        results = {"not_measured": str(reason)}
    return report("fetch_choice", results, checks(results), card(results), keep=args.keep)


def measure(model: BenchModel, prompts: Prompts, num_rounds: int) -> dict[str, Any]:
    """Fill the store, shape the link, time every way. Raises NotMeasured without namespaces."""
    with ExitStack() as stack:
        listening = ("--bind", "0.0.0.0", "--protected-mode", "no", "--port", str(PORT))
        command = bare_command(STORE_BYTES, *listening)
        pid = stack.enter_context(shaped_link.far_server(command))
        address = RedisAddress(f"redis://{shaped_link.FAR}:{PORT}", timeout_s=TIMEOUT_S)
        wait_for_answer(address)
        engines = {
            way: stack.enter_context(
                stored_engine(
                    model,
                    NUM_THREADS,
                    None if way == COMPUTE else address,
                    OPTIONS | {"engine.max_model_len": max(prompts) + 16},
                    token_bytes=TOKEN_BYTES,
                    knows_rates=way == CHOICE,
                )
            )
            for way in (COMPUTE, FETCH, CHOICE)
        }
        [stored] = random_prompts(model, 1, min(prompts), seed=0)
        [unknown] = random_prompts(model, 1, sorted(prompts)[len(prompts) // 2], seed=0)
        for prompt in (stored, *prompts.values()):
            ttft_ms(engines[FETCH], prompt)
        shaped_link.shape(pid, BITS_PER_S)
        raw = raw_read_rate(address, [os.urandom(VALUE_BYTES)] * RAW_VALUES, num_rounds=1)
        ttft_ms(engines[CHOICE], stored)  # no rate is known yet: it fetches and learns the link's
        ttft_ms(engines[CHOICE], unknown)  # and here how fast prompts are computed
        lengths = {str(n): time_ways(engines, prompts[n], num_rounds) for n in prompts}
    return {"raw_bytes_per_s": raw, "lengths": lengths}


def time_ways(
    engines: dict[str, Stored], prompt: list[int], num_rounds: int
) -> dict[str, list[Any]]:
    """TTFT in ms of each way, in turn, and what the store chose."""
    found: dict[str, list[Any]] = {f"{way}_ms": [] for way in engines} | {"chosen": []}
    for _ in range(num_rounds):
        for way, stored in engines.items():
            before = stored.bytes_moved("read")
            found[f"{way}_ms"].append(ttft_ms(stored, prompt))
            if way == CHOICE:
                found["chosen"].append(FETCH if stored.bytes_moved("read") > before else COMPUTE)
    return found


def ttft_ms(stored: Stored, prompt: list[int]) -> float:
    """TTFT of a prompt that memory doesn't have; memory forgets it again afterwards."""
    timing = drive(stored.engine, [prompt], 1)
    stored.flush()
    stored.forget()
    return timing.ttft_s * 1e3


def right_choices(one: dict[str, list[Any]]) -> list[bool]:
    """For each round, True if the chosen way took no longer than the other one."""
    took = {way: median(one[f"{way}_ms"]) for way in (COMPUTE, FETCH)}
    return [took[chosen] <= CLOSE_CALL * min(took.values()) for chosen in one["chosen"]]


def faster(one: dict[str, list[Any]]) -> str:
    """Which way really is."""
    return min((COMPUTE, FETCH), key=lambda way: median(one[f"{way}_ms"]))


def checks(results: dict[str, Any]) -> list[Check]:
    """What the design promises: the right choice, shown where computing and where fetching wins."""
    if "lengths" not in results:
        return [Check("fetch or compute at 1 Gbit/s: right choices", None, "%", 100)]
    lengths = results["lengths"].values()
    right = [is_right for one in lengths for is_right in right_choices(one)]
    sides = [faster(one) for one in lengths]
    return [
        Check(
            "fetch or compute at 1 Gbit/s: right choices", sum(right) / len(right) * 100, "%", 100
        ),
        Check(
            "fetch or compute: lengths on the rarer side of the crossover",
            min(sides.count(COMPUTE), sides.count(FETCH)),
            "",
            1,
        ),
    ]


def card(results: dict[str, Any]) -> list[str]:
    if "lengths" not in results:
        return [f"NOT MEASURED: {results['not_measured']}.", ""]
    rows = [
        [
            length,
            *(f"{median(one[f'{way}_ms']):.0f}" for way in (COMPUTE, FETCH, CHOICE)),
            faster(one),
            " ".join(one["chosen"]),
        ]
        for length, one in results["lengths"].items()
    ]
    header = ["prompt tokens", "computed", "fetched", "as chosen", "faster", "chosen"]
    megabits = results["raw_bytes_per_s"] * 8 / 1e6
    return [
        "TTFT in ms over a link of 1 Gbit/s, the 26B's bytes for each token and window",
        *table(header, rows),
        f"A bare socket reads {megabits:.0f} Mbit/s through the link.",
        "",
    ]


if __name__ == "__main__":
    shaped_link.enter()
    main()
