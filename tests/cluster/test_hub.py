"""A model by its hub id without a network: from the hub's cache, else a sentence."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import DEMO_MODEL_DIR
from deployments import cli

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and a hub at a port where nobody listens. Counts for processes to come."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub-home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)


def cached(home: Path, model: str) -> Path:
    """What a download of the demo model under a hub id leaves behind: its snapshot."""
    repo = home / "hub" / f"models--{model.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for file in DEMO_MODEL_DIR.iterdir():
        (snapshot / file.name).symlink_to(file)
    return snapshot


@pytest.mark.parametrize("is_offline", ["0", "1"])
def test_a_model_that_is_not_there_is_said(
    no_network: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_offline: str,
) -> None:
    """Through the detached process, as a user meets it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", is_offline)
    state = tmp_path / "state"
    at = ["--set", f"state_dir={state}", "--set", "gateway.port=0"]
    at += ["--set", "gateway.http_port=0", "--set", "gateway.metrics_port=0"]
    assert cli.main(["up", *at, "--set", "model=some/model"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("error: 'some/model' is no local directory")
    assert "Check the name and the network" in said and "Traceback" not in said
    assert "Traceback" not in (state / "logs" / "supervisor.log").read_text()


@pytest.mark.parametrize("is_offline", ["0", "1"])
def test_a_cached_model_needs_no_network(no_network: None, tmp_path: Path, is_offline: str) -> None:
    snapshot = cached(tmp_path / "hub-home", "some/model")
    code = (
        "from cluster.checkpoint import resolve_model\n"
        "from cluster.config import Config\n"
        "from deployments.start.preflight import check\n"
        "ports = {'gateway.port': 0, 'gateway.http_port': 0, 'gateway.metrics_port': 0}\n"
        "config = Config.load(None, {'model': 'some/model', 'engine.kv_bytes': '1MiB', **ports})\n"
        "print(config.model_id, check(config).num_experts, resolve_model(config.model_source))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": is_offline},
        capture_output=True,
        check=True,
        text=True,
    )
    assert output.stdout.split() == ["model", "16", str(snapshot)]
