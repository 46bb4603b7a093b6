"""Clients whose machine vanishes: no FIN, no RST, only silence. Their answers end all the same.

The client runs behind a network of its own whose cable is pulled; it takes root to lay one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from tests.support.gateway.fake_decoder import Decoder, make_tokenizer
from tests.support.gateway.running import running_gateway, serving
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[4]
SUBNET = os.getpid() % 16384  # of those with two addresses, in a range for tests of networks
HERE, THERE = (f"198.18.{SUBNET // 64}.{SUBNET % 64 * 4 + i}" for i in (1, 2))


class Apart:
    """A network that is joined to this machine's by one cable."""

    name = f"briolette-{os.getpid()}"
    _cable = f"b{os.getpid()}"

    def open(self) -> None:
        ip("netns", "add", self.name)
        ip("link", "add", self._cable, "type", "veth", "peer", "name", "far", "netns", self.name)
        ip("addr", "add", f"{HERE}/30", "dev", self._cable)
        ip("link", "set", self._cable, "up")
        ip("-n", self.name, "addr", "add", f"{THERE}/30", "dev", "far")
        ip("-n", self.name, "link", "set", "far", "up")

    def pull_cable(self) -> None:
        ip("-n", self.name, "link", "set", "far", "down")

    def close(self) -> None:
        """Whatever there is of it."""
        for thing in (("link", self._cable), ("netns", self.name)):
            subprocess.run(["ip", thing[0], "del", thing[1]], capture_output=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def apart() -> Iterator[Apart]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and the command ip (Debian: apt-get install iproute2).")
    network = Apart()
    try:
        network.open()
        yield network
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network of its own can be made here: {error.stderr.strip()}")
    finally:
        network.close()


@pytest.mark.parametrize("dialect", ["grpc", "http stream", "http"])
def test_the_answer_to_a_vanished_client_ends(
    dialect: str, apart: Apart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.gateway.gateway.PING_S", 1.0)
    monkeypatch.setattr("deployments.gateway.gateway.PONG_S", 1.0)
    monkeypatch.setattr("deployments.gateway.http.server.DEAD_AFTER_S", 3)
    tokenizer, registry = make_tokenizer(), CollectorRegistry()
    decoder = Decoder(tokenizer)
    blocks = decoder.engine.stats().num_free_blocks
    with running_gateway(tokenizer, decoder.find, registry=registry, host="0.0.0.0") as gateway:
        wait_for(lambda: serving(gateway))
        decoder.runner.step_s = 0.05  # 400 tokens take 20 s
        port = gateway.port if dialect == "grpc" else gateway.http_port
        command = [
            "ip",
            "netns",
            "exec",
            apart.name,
            sys.executable,
            "-m",
            "tests.support.gateway.streaming_client",
        ]
        with subprocess.Popen(
            [*command, dialect, f"{HERE}:{port}"], stdout=subprocess.PIPE, cwd=ROOT
        ) as client:
            assert client.stdout is not None and client.stdout.readline()
            wait_for(lambda: decoder.engine.stats().num_decode_tokens > 5)
            apart.pull_cable()
            pulled = time.monotonic()
            client.kill()  # which nobody hears of
        assert decoder.engine.has_work
        wait_for(lambda: not decoder.engine.has_work, 10)
        assert time.monotonic() - pulled > 0.5  # it wasn't the end of the process
        assert decoder.engine.stats().num_decode_tokens < 300
        assert decoder.engine.stats().num_free_blocks == blocks
        decoder.engine.check_integrity()
        labels = {"tenant": "default", "reason": "client"}
        labels["method"] = "Complete" if dialect == "grpc" else "/v1/completions"
        name = "briolette_gateway_aborted_total"
        wait_for(lambda: registry.get_sample_value(name, labels) == 1)
    decoder.close()
