"""Many clients of both dialects for minutes: does every request end, and does memory stay flat?

`python -m bench.team.soak` starts a cluster with the demo model; half of the clients speak gRPC,
half use OpenAI's SDK. Each asks again as soon as it is answered; some cancel in the middle.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import grpc
import openai
import psutil

from bench.lib.card import Check, pin, report, table
from bench.lib.models import load_models
from bench.lib.ours import Cluster
from bench.lib.peers import NotMeasured
from protos.briolette.v1.admin_pb2 import ClusterStatus, GetStatusRequest
from protos.briolette.v1.admin_pb2_grpc import AdminStub
from protos.briolette.v1.inference_pb2 import ChatRequest, Message, Sampling
from protos.briolette.v1.inference_pb2_grpc import InferenceStub

NUM_STREAMS, WARM_UP_S, SECONDS = 200, 60.0, 300.0
SAMPLE_S = 1.0
WINDOW_SHARE = 0.1  # of the run, at its beginning and its end: what is compared
CANCELLED_SHARE = 0.1
GIVE_UP_S = 60.0  # without an end: lost
SETTLE_S = 30.0  # for the engine to be idle, once nobody asks
RETRY_S = 0.5  # after a refusal
REFUSALS = ("RESOURCE_EXHAUSTED", "UNAVAILABLE")

# What Redis keeps is bounded, and is full before the clock starts.
OPTIONS = {
    "engine.max_num_seqs": 64,
    "engine.max_queue_per_tenant": 256,  # there are no keys here: all clients are one tenant
    "engine.kv_bytes": 128 << 20,
    "store.max_bytes": 64 << 20,
    "store.tenant_bytes": 16 << 20,
    "gateway.http_port": 0,
}

Ask = Callable[[str, int, bool], Awaitable[str]]  # question, max_tokens, whether to cancel


@dataclass(slots=True)
class Tally:
    """How requests ended, and what memory was meanwhile."""

    outcomes: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    rss: list[dict[int, int]] = field(default_factory=list)  # bytes, by process id
    names: dict[int, str] = field(default_factory=dict)  # by process id

    def note(self, outcome: str) -> None:
        kind = outcome.partition(":")[0]
        self.outcomes[kind] += 1
        if kind == "error" and len(self.errors) < 5:
            self.errors.append(outcome)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the card, return the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=NUM_STREAMS, help="clients at once")
    parser.add_argument("--warm-up", type=float, default=WARM_UP_S, metavar="S")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S")
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    args = parser.parse_args(argv)
    pin(2)
    [model] = load_models(["demo"])
    results: dict[str, Any] = {"num_streams": args.streams, "seconds": args.seconds}
    try:
        with closing(Cluster(model, OPTIONS)) as cluster:
            tally, status = asyncio.run(soak(cluster, args.streams, args.warm_up, args.seconds))
        results |= summarize(tally, status)
    except NotMeasured as reason:
        results["not_measured"] = str(reason)
    return report("soak", results, checks(results), card(results), keep=args.keep)


async def soak(
    cluster: Cluster, num_streams: int, warm_up_s: float, seconds: float
) -> tuple[Tally, ClusterStatus]:
    """What was seen after the warm-up, and the status once the engine is idle."""
    tally, warming = Tally(), Tally()
    started = time.monotonic()
    stop_at = started + warm_up_s + seconds

    async def client(ask: Ask, seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < stop_at:
            now = tally if time.monotonic() - started > warm_up_s else warming
            outcome = await ended(ask, rng)
            now.note(outcome)
            if outcome == "refused":
                await asyncio.sleep(RETRY_S)

    async with grpc.aio.insecure_channel(str(cluster.running.address)) as channel:
        sdk = openai.AsyncOpenAI(
            base_url=cluster.running.base_url,
            api_key="none",
            max_retries=0,
            timeout=GIVE_UP_S * 2,
        )
        asks = (over_grpc(InferenceStub(channel)), over_http(sdk, cluster.running.model))
        clients = [asyncio.create_task(client(asks[i % 2], i)) for i in range(num_streams)]
        watching = asyncio.create_task(
            watch_memory(tally, cluster.running.pid, started + warm_up_s)
        )
        await asyncio.gather(*clients)
        watching.cancel()
        await sdk.close()
        return tally, await idle_status(AdminStub(channel))


async def ended(ask: Ask, rng: random.Random) -> str:
    """How one request ended: done, cancelled, refused, lost, or an error and its words."""
    question = f"What is {rng.randrange(100)} + {rng.randrange(100)}?"
    try:
        async with asyncio.timeout(GIVE_UP_S):
            return await ask(question, rng.randrange(16, 97), rng.random() < CANCELLED_SHARE)
    except TimeoutError:
        return "lost"


def over_grpc(stub: InferenceStub) -> Ask:
    async def ask(question: str, max_tokens: int, cancels: bool) -> str:
        sampling = Sampling(max_tokens=max_tokens)
        messages = [Message(role="user", content=question)]
        call: Any = stub.Chat(ChatRequest(messages=messages, sampling=sampling))
        has_begun = False
        try:
            async for piece in call:
                has_begun = True
                if cancels:
                    call.cancel()
                    return "cancelled"
                if piece.finish_reason:
                    return "done"
        except grpc.aio.AioRpcError as error:
            if error.code().name in REFUSALS and not has_begun:
                return "refused"
            return f"error: {error.code().name}: {error.details()}"
        return "error: a stream ended without a reason"

    return ask


def over_http(sdk: openai.AsyncOpenAI, model: str) -> Ask:
    async def ask(question: str, max_tokens: int, cancels: bool) -> str:
        try:
            async with await sdk.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                max_tokens=max_tokens,
                stream=True,
            ) as chunks:
                async for chunk in chunks:
                    if cancels:
                        return "cancelled"
                    if chunk.choices and chunk.choices[0].finish_reason:
                        return "done"
        except openai.APIStatusError as error:
            if error.status_code in (429, 503):
                return "refused"
            return f"error: {error.status_code}: {error.message}"
        except openai.APIError as error:
            return f"error: {error}"
        return "error: a stream ended without a reason"

    return ask


async def watch_memory(tally: Tally, session_id: int, start_at: float) -> None:
    """Resident memory of every process of the cluster, once a second from `start_at` on."""
    await asyncio.sleep(start_at - time.monotonic())
    while True:
        tally.rss.append(await asyncio.to_thread(rss, session_id, tally.names))
        await asyncio.sleep(SAMPLE_S)


def rss(session_id: int, names: dict[int, str]) -> dict[int, int]:
    """Resident bytes by process id. Its first name counts: Ray renames its processes."""
    found = {}
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session_id:
                names.setdefault(process.pid, process.name())
                found[process.pid] = process.memory_info().rss
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


async def idle_status(admin: AdminStub) -> ClusterStatus:
    """Once no request is left, or after a while."""
    give_up_at = time.monotonic() + SETTLE_S
    while True:
        await asyncio.sleep(2.0)  # a status is at most a second old
        call: Any = admin.GetStatus(GetStatusRequest())
        status: ClusterStatus = await call
        load = status.load
        if not (load.num_running or load.num_waiting) or time.monotonic() > give_up_at:
            return status


def summarize(tally: Tally, status: ClusterStatus) -> dict[str, Any]:
    """Memory at the beginning is compared with memory at the end."""
    num = max(1, round(len(tally.rss) * WINDOW_SHARE))
    first, last = tally.rss[:num], tally.rss[-num:]
    start, end = (median(sum(sample.values()) for sample in part) for part in (first, last))
    by_process = {
        f"{tally.names[pid]} {pid}": [
            median(sample.get(pid, 0) for sample in part) for part in (first, last)
        ]
        for pid in sorted(first[0] | last[-1])
    }
    return {
        "outcomes": dict(tally.outcomes),
        "errors": tally.errors,
        "rss_bytes": [start, end],
        "rss_growth": end / start - 1,
        "rss_by_process": by_process,
        "processes_ended": len(first[0].keys() - last[-1].keys()),
        "requests_left": status.load.num_running + status.load.num_waiting,
        "blocks_left": sum(group.used for group in status.load.kv_blocks),
    }


def checks(results: dict[str, Any]) -> list[Check]:
    outcomes: dict[str, int] = results.get("outcomes", {})

    def at_most(name: str, value: Callable[[], float], target: float = 0) -> Check:
        return Check(name, value() if outcomes else None, "", target, at_least=False)

    done = outcomes.get("done", 0) / sum(outcomes.values()) if outcomes else None
    return [
        Check("requests answered to the end, share", done, "", 1 - 2 * CANCELLED_SHARE),
        at_most("errors", lambda: outcomes.get("error", 0)),
        at_most("requests without an end", lambda: outcomes.get("lost", 0)),
        at_most("memory growth", lambda: results["rss_growth"], 0.02),
        at_most("processes that ended", lambda: results["processes_ended"]),
        at_most("requests left", lambda: results["requests_left"]),
        at_most("KV blocks left", lambda: results["blocks_left"]),
    ]


def card(results: dict[str, Any]) -> list[str]:
    if "not_measured" in results:
        return [results["not_measured"]]
    ends = [[outcome, str(count)] for outcome, count in sorted(results["outcomes"].items())]
    memory = [
        [name, f"{before / 2**20:.0f}", f"{after / 2**20:.0f}"]
        for name, (before, after) in results["rss_by_process"].items()
    ]
    return [
        f"{results['num_streams']} clients for {results['seconds']:g} s, after a warm-up",
        *table(["request", "ended"], ends),
        *table(["process", "RSS MiB, start", "end"], memory),
        *results["errors"],
    ]


if __name__ == "__main__":
    main()
