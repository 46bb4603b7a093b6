"""Sessions end to end: a conversation goes on after a restart of everything, and ends in Redis."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.config import DEMO_MODEL_DIR, Config
from cluster.store.redis import RedisAddress
from deployments import cli
from deployments.commands.client import Client
from deployments.redis_store import store_address
from deployments.start import lifecycle
from protos.briolette.v1.inference_pb2 import Generation, Message, Sampling

pytestmark = pytest.mark.cluster

SETTINGS = {
    "batch_invariant": True,
    "gateway": {"port": 0, "http_port": 0, "metrics_port": 0},
    "engine": {"kv_bytes": 64 << 20, "max_model_len": 1024},
    "experts": {"mode": "local"},
    "device": "cpu",
}
REMEMBER = "Please remember that the code of Anna is 4821."
# Longer than the sliding window, so that the code is only in the global layers and in Redis.
FILLER = "What is the capital of Norway? " * 12


@pytest.fixture
def config() -> Iterator[Config]:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "demo"  # a copy: a training run may export a better one meanwhile
        shutil.copytree(DEMO_MODEL_DIR, model)
        yield Config.load(None, {**SETTINGS, "model": str(model), "state_dir": f"{folder}/state"})


@contextmanager
def running(config: Config) -> Iterator[Client]:
    running = lifecycle.start(config, lambda news: None)
    try:
        assert running.address is not None
        with Client(running.address) as client:
            yield client
    finally:
        lifecycle.stop(config.state_dir)


def ask(client: Client, question: str) -> tuple[str, Generation]:
    """The text of an answer in the session, and its last piece."""
    greedy = Sampling(temperature=0.0, max_tokens=32)
    messages = [Message(role="user", content=question)]
    pieces = list(client.chat(messages, greedy, "anna", timeout_s=60))
    return "".join(piece.text for piece in pieces), pieces[-1]


def command(config: Config, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `briolette sessions` prints, in one line."""
    assert cli.main(["sessions", *arguments, "--set", f"state_dir={config.state_dir}"]) == 0
    return " ".join(capsys.readouterr().out.split())


def keys(address: RedisAddress) -> set[bytes]:
    """Return all keys but those of usage, which outlive sessions."""
    found = (bytes(key) for key in address.client().scan_iter("*"))
    return {key for key in found if not key.startswith(b"briolette:usage:")}


def test_a_session_outlives_everything_until_it_is_deleted(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    address = store_address(config)
    assert address is not None
    with running(config) as client:
        before = keys(address)
        ask(client, REMEMBER)
        _, second = ask(client, FILLER)
        assert second.usage.cached_tokens > 0
        num_tokens = client.get_session("anna").session.num_tokens
        assert re.match(r"Parked anna: [\d.]+ kB", command(config, capsys, "park", "anna"))
        status = client.status()
        assert sum(group.cached for group in status.load.kv_blocks) == 0
    with running(config) as client:
        assert re.search(rf"anna {num_tokens} [\d.]+ kB .* parked$", command(config, capsys))
        text, piece = ask(client, "What is the code of Anna?")
        assert "4821" in text
        assert piece.usage.fetched_tokens == piece.usage.cached_tokens > num_tokens - 32
        assert command(config, capsys, "delete", "anna") == "Deleted anna."
        assert keys(address) == before and client.list_sessions() == []
