"""The command line without a cluster: what a user can get wrong, and what each mistake says."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from rich.console import Console

from cluster.config import DEMO_MODEL_DIR, Config
from cluster.errors import (
    BrioletteError,
    CheckpointError,
    ConfigError,
    InvalidRequest,
    NotEnoughMemory,
    PortTaken,
)
from cluster.spec import ModelSpec
from deployments import cli
from deployments.commands.cards import StartDisplay, status_card
from deployments.commands.chat import Conversation
from deployments.commands.client import Client
from deployments.layout import decoder_gpus, decoder_threads, host_gpus, host_threads, place_experts
from deployments.process.report import read_reports, reporting
from deployments.start import lifecycle, preflight
from protos.briolette.v1.admin_pb2 import ClusterStatus, KvStore
from protos.briolette.v1.inference_pb2 import Generation, Message, Sampling


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield int(other.getsockname()[1])


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that fails says: one sentence, and no stack trace."""
    assert cli.main(list(arguments)) == 1
    said = capsys.readouterr().err
    assert said.startswith("error:") and "Traceback" not in said
    return " ".join(said.split())


def settings(tmp_path: Path, **overrides: object) -> Config:
    ports = {"gateway.port": 0, "gateway.http_port": 0, "gateway.metrics_port": 0}
    return Config.load(None, {"state_dir": str(tmp_path), **ports, **overrides})


def test_a_wrong_key_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = failure(capsys, "up", "--set", "gateway.prot=1", "--set", f"state_dir={tmp_path}")
    assert "gateway.prot" in said and "did you mean gateway.port" in said
    file = tmp_path / "config.yaml"
    file.write_text("modle: demo\n")
    assert "modle" in failure(capsys, "up", "--config", str(file))
    assert "can't be read" in failure(capsys, "up", "--config", str(tmp_path / "none.yaml"))


def test_up_says_why_it_fails_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the detached process, as a user meets it."""
    at = ["--set", f"state_dir={tmp_path}", "--set", "gateway.port=0"]
    said = failure(capsys, "up", *at, "--set", "model=/no/such/model")
    assert "/no/such/model" in said and "does not exist" in said
    assert lifecycle.find_running(tmp_path) is None
    assert not (tmp_path / "running.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupt_while_starting_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    arguments = ["up", "--set", f"state_dir={tmp_path}", "--set", "gateway.port=0"]
    arguments += ["--set", "gateway.http_port=0", "--set", "gateway.metrics_port=0"]
    arguments += ["--set", "engine.kv_bytes=64MiB"]
    command = [sys.executable, "-m", "deployments.cli", *arguments]

    def as_in_a_terminal() -> None:  # what runs these tests may ignore the signal
        signal.signal(number, signal.SIG_DFL)

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal
    ) as process:
        running = None
        while running is None and process.poll() is None:
            time.sleep(0.05)
            running = lifecycle.find_running(tmp_path)
        time.sleep(1.0)  # in the middle of Ray's start
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    assert running is not None and process.returncode == 130
    assert "everything that was started has been stopped" in " ".join(said.split())
    assert not Path(running.ray_dir).exists() and lifecycle.find_running(tmp_path) is None
    assert [pid for pid in psutil.pids() if in_session(pid, running.pid)] == []


def test_down_while_a_model_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken_port: int
) -> None:
    """From a hub that never answers."""
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken_port}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    at = ["--set", f"state_dir={tmp_path}"]
    arguments = ["up", *at, "--set", "gateway.port=0", "--set", "model=no/such-model"]
    command = [sys.executable, "-m", "deployments.cli", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while lifecycle.find_running(tmp_path) is None and process.poll() is None:
            time.sleep(0.05)
        assert cli.main(["down", *at]) == 0
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "interrupted" in said
    assert lifecycle.find_running(tmp_path) is None and not (tmp_path / "running.json").exists()


def test_a_process_that_ignores_the_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all it started."""
    monkeypatch.setattr(lifecycle, "STOP_TIMEOUT_S", 0.5)
    code = (
        "import pathlib, signal, subprocess, sys, time\n"
        "from cluster.config import Config\n"
        "from deployments.start.lifecycle import Running, holding\n"
        "config = Config.load(None, {'state_dir': sys.argv[1]})\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "with holding(config.state_dir):\n"
        "    subprocess.Popen(['sleep', '60'])\n"
        "    Running.this_process(config).write(config.state_dir)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, start_new_session=True) as process:
        while (running := lifecycle.find_running(tmp_path)) is None and process.poll() is None:
            time.sleep(0.05)
        assert lifecycle.stop(tmp_path)
    assert running is not None and lifecycle.find_running(tmp_path) is None
    assert not Path(running.ray_dir).exists()
    assert [pid for pid in psutil.pids() if in_session(pid, running.pid)] == []


def test_the_card_shows_the_store() -> None:
    def shown(**fields: Any) -> str:
        status = ClusterStatus(ready=True, kv_store=KvStore(address="unix:///redis.sock", **fields))
        console = Console(width=120, file=io.StringIO(), force_terminal=False)
        console.print(status_card(status, "127.0.0.1:1", 0.0))
        return str(console.file.getvalue())  # type: ignore[attr-defined]

    full = dict(up=True, used_bytes=5_000_000, max_bytes=9_000_000, fetched=3, recomputed=1)
    assert "unix:///redis.sock: 5 MB of 9 MB, refuses to store more, 3 prefixes" in shown(**full)
    assert "5 MB of 9 MB, 3 prefixes fetched, 1 computed" in shown(**full, writable=True)
    assert "doesn't answer" in shown(up=False)


def test_a_start_passes_on_what_it_warns_of() -> None:
    console = Console(width=120, file=io.StringIO(), force_terminal=False)
    with StartDisplay(console) as display:
        display.show({"warning": "Redis [x] doesn't answer."})
    assert "Redis [x] doesn't answer." in console.file.getvalue()  # type: ignore[attr-defined]


def test_an_error_may_look_like_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = failure(capsys, "up", "--set", f"state_dir={tmp_path}", "--set", "model=[/x]/y[red]")
    assert "[/x]/y[red]" in said


class FullContext:
    """A client whose model takes one message and no more."""

    def chat(
        self, messages: Sequence[Message], sampling: Sampling, session: str, thinking: bool
    ) -> Iterator[Generation]:
        if len(messages) > 1:
            raise InvalidRequest("The prompt is too long.")
        yield Generation(text="Hello!", token_ids=[1])


def test_a_full_conversation_starts_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["Hi", "Hi", "/new", "Hi"])

    def read(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    client = cast(Client, FullContext())
    Conversation(client, Sampling(), Console(highlight=False)).run()
    said = capsys.readouterr().out
    assert said.count("Hello!") == 2 and said.count("/new starts over with") == 1


class Thinker:
    """A client whose model thinks in two pieces, then answers."""

    def chat(
        self, messages: Sequence[Message], sampling: Sampling, session: str, thinking: bool
    ) -> Iterator[Generation]:
        assert thinking
        yield Generation(thought="It ", token_ids=[1])
        yield Generation(thought="rains.", token_ids=[1])
        yield Generation(text="Take [an] umbrella.", token_ids=[1])


def test_thoughts_are_dimmed() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    client = cast(Client, Thinker())
    Conversation(client, Sampling(), console, thinking=True).ask("Well?")
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said == "\x1b[2mIt \x1b[0m\x1b[2mrains.\x1b[0m\n\nTake [an] umbrella.\n"


def in_session(pid: int, session_id: int) -> bool:
    """Whether a process of the session runs; one that is dead and not yet reaped doesn't."""
    try:
        is_dead = psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        return not is_dead and os.getsid(pid) == session_id
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


@pytest.mark.parametrize("key", ["gateway.port", "gateway.http_port", "gateway.metrics_port"])
def test_a_taken_port_is_said(tmp_path: Path, taken_port: int, key: str) -> None:
    with pytest.raises(PortTaken, match=f"{taken_port}.*{key}"):
        preflight.check(settings(tmp_path, **{key: taken_port}))


def test_too_little_memory_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughMemory, match=r"GB .* are free"):
        preflight.check(settings(tmp_path, **{"engine.kv_bytes": 10**15, "device": "cpu"}))


def test_a_model_that_is_none_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="llama"):
        preflight.check(settings(tmp_path, model=str(tmp_path)))


def test_more_hosts_than_experts_is_said(tmp_path: Path) -> None:
    many = {"experts.num_hosts": 17, "experts.num_groups": 32}
    with pytest.raises(ConfigError, match="num_hosts"):
        preflight.check(settings(tmp_path, **many))


def test_without_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ["--set", f"state_dir={tmp_path}"]
    assert cli.main(["status", *at]) == 1
    assert "Nothing is running" in capsys.readouterr().out
    assert "Nothing is running" in failure(capsys, "chat", *at, "Hello!")
    assert cli.main(["down", *at]) == 0
    assert "Nothing is running" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"briolette {metadata.version('briolette')}\n"


@pytest.mark.parametrize("file", [None, "config.yaml"])
def test_hints_reach_the_same_cluster(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file: str | None,
) -> None:
    """Wherever its state_dir was set; a hint is for a shell, so a space is quoted."""
    state_dir = tmp_path / "my cluster"
    running = lifecycle.Running(
        *(1, "", "", "demo", 0.0, "127.0.0.1:5"), base_url="http://127.0.0.1:8/v1"
    )
    monkeypatch.setattr(lifecycle, "start", lambda config, on_progress: running)
    options = ["--set", f"state_dir={state_dir}"]
    if file is not None:
        (tmp_path / file).write_text(f"state_dir: {state_dir}\ngateway: {{auth: keys}}\n")
        options = ["--config", str(tmp_path / file)]
    assert cli.main(["up", *options]) == 0
    said = capsys.readouterr().out
    at = f"--set 'state_dir={state_dir}'"
    assert f'Try: briolette chat "What is 27 + 58?" {at} ' in said
    assert f"Stop it: briolette down {at}\n" in said
    assert "Chat page: http://127.0.0.1:8/\n" in said
    assert (f"briolette keys create NAME {at}" in said) == (file is not None)
    assert cli.main(["status", *options]) == 1
    assert capsys.readouterr().out == f"Nothing is running; start it: briolette up {at}\n"


def test_help_is_instant() -> None:
    """Heavy packages are imported by the commands that need them."""
    code = (
        "import sys, deployments.cli\n"
        "print(sorted({'torch', 'ray', 'grpc', 'transformers'} & set(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert output.stdout.strip() == "[]"


def test_a_part_that_fails_leaves_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BrioletteError), reporting(tmp_path, "host0") as reporter:
        reporter.progress(1, 4)
        assert read_reports(tmp_path)[0].progress == 0.25
        raise CheckpointError("Tensor 'x' is missing.")
    (report,) = read_reports(tmp_path)
    assert (report.part, report.error) == ("host0", "Tensor 'x' is missing.")


def test_who_gets_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    spec = ModelSpec.load(DEMO_MODEL_DIR)
    config = Config()
    placement = place_experts(config, spec)
    assert placement is not None and placement.host_ids == ["host0", "host1"]
    assert decoder_threads(config, 2) == host_threads(config, 2) == 4
    assert (decoder_gpus(config, 0, 2), host_gpus(config, 0, 2)) == (0, 0)
    assert host_gpus(config, 1, 2) == 0.3333
    assert decoder_gpus(config, 1, 2) == pytest.approx(0.3334)
    assert (decoder_gpus(config, 4, 2), host_gpus(config, 4, 2)) == (1, 1)
    local = Config.load(None, {"experts.mode": "local"})
    assert place_experts(local, spec) is None and decoder_threads(local, 0) == 12


def test_a_broken_checkpoint_is_said_with_its_tensor(tmp_path: Path) -> None:
    from deployments.loading import ModelSource, load_local_experts

    model = tmp_path / "model"
    shutil.copytree(DEMO_MODEL_DIR, model)
    config = json.loads((model / "config.json").read_text())
    config["moe_intermediate_size"] += 1
    (model / "config.json").write_text(json.dumps(config))
    changed = settings(tmp_path, model=str(model))
    with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj"):
        load_local_experts(changed, ModelSource.open(changed))
