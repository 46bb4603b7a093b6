"""End to end on Ray: a cluster remembers across its restart, and loses nothing with its Redis."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from cluster.config import Config
from deployments.commands.client import Client
from deployments.redis_store import problem_of, store_address
from deployments.start import lifecycle
from deployments.start.lifecycle import Running
from protos.briolette.v1.inference_pb2 import Generation, Message
from tests.support.running_cluster import greedy, metric, name_of, session_pids
from tests.support.waiting import wait_for

pytestmark = pytest.mark.cluster

QUESTION = [Message(role="user", content="Tell me of " + ", ".join(["the capital of Norway"] * 9))]


@pytest.fixture
def config() -> Iterator[Config]:
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "batch_invariant": True,
            "gateway": {"port": 0, "http_port": 0, "metrics_port": 0},
            "engine": {"kv_bytes": 64 << 20, "max_model_len": 1024},
            "experts": {"mode": "local"},
            "device": "cpu",
            "state_dir": f"{folder}/state",
        }
        yield Config.load(None, settings)


@contextmanager
def up(config: Config) -> Iterator[tuple[Running, Client]]:
    running = lifecycle.start(config, lambda news: None)
    try:
        assert running.address is not None
        with Client(running.address) as client:
            yield running, client
    finally:
        lifecycle.stop(config.state_dir)


def test_a_restart_of_everything_and_a_killed_redis_lose_nothing(config: Config) -> None:
    with up(config) as (running, client):
        cold = list(client.chat(QUESTION, greedy(64)))
        assert cold[-1].usage.cached_tokens == 0
        wait_for(lambda: client.status().kv_store.used_bytes > 0)
        settings = [pid for pid in session_pids(running) if "max_model_len" in name_of(pid)]
        assert not settings  # a password in them would be for everybody to read
    with up(config) as (running, client):
        warm = list(client.chat(QUESTION, greedy(64)))
        assert tokens(warm) == tokens(cold)
        assert warm[-1].usage.cached_tokens == 48  # of 60: whole blocks
        port = client.status().decoder.metrics_port
        assert metric(port, "kv_store_reads_total", outcome="ok") > 0
        assert metric(port, "kv_store_decisions_total", choice="fetch") == 1
        wait_for(lambda: client.status().kv_store.fetched == 1)

        pieces, seen = client.chat(QUESTION, greedy(64)), list[Generation]()
        for piece in pieces:
            seen.append(piece)
            if len(seen) == 2:
                os.kill(redis_pid(running), signal.SIGKILL)
        assert tokens(seen) == tokens(cold)
        address = store_address(config)
        assert address is not None
        wait_for(lambda: problem_of(address) is None, 20)  # started again
        with address.client() as redis:
            assert list(redis.scan_iter("briolette:*:kv:*"))  # with what it had
        wait_for(lambda: client.status().kv_store.up, 20)


def redis_pid(running: Running) -> int:
    (pid,) = (p for p in session_pids(running) if psutil.Process(p).name() == "redis-server")
    return pid


def tokens(pieces: list[Generation]) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]
