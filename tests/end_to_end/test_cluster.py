"""End to end on Ray: one cluster on this machine with two pretended cards, for the module."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.config import DEMO_MODEL_DIR, Config
from cluster.errors import InvalidRequest, Unavailable
from deployments import cli
from deployments.commands.client import Client
from deployments.gateway.scrape_targets import FILE
from deployments.loading import ModelSource, load_engine, load_local_experts
from deployments.start import lifecycle
from deployments.start.lifecycle import Running
from engine.request import SamplingParams
from protos.briolette.v1.admin_pb2 import ClusterStatus
from protos.briolette.v1.inference_pb2 import Generation, Sampling
from tests.support.running_cluster import (
    QUESTION,
    answer,
    greedy,
    metric,
    name_of,
    session_pids,
)
from tests.support.waiting import wait_for

pytestmark = pytest.mark.cluster

LOOPBACK = ("127.0.0.1", "::ffff:127.0.0.1", "::1")

SCHEMA = {
    "type": "object",
    "properties": {"capital": {"enum": ["Oslo", "Paris"]}, "is_sure": {"type": "boolean"}},
    "required": ["capital", "is_sure"],
    "additionalProperties": False,
}
SETTINGS = {
    "batch_invariant": True,
    "gateway": {"port": 0, "http_port": 0, "metrics_port": 0},
    "engine": {"kv_bytes": 64 << 20, "max_model_len": 1024},
    "experts": {"num_copies": 2, "num_gpus_per_host": 1, "timeout_s": 5.0},
    "ray": {"num_gpus": 2},
    "device": "cpu",
}


@pytest.fixture(scope="module")
def config() -> Iterator[Config]:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "demo"  # a copy: a training run may export a better one meanwhile
        shutil.copytree(DEMO_MODEL_DIR, model)
        yield Config.load(None, {**SETTINGS, "model": str(model), "state_dir": f"{folder}/state"})


@pytest.fixture(scope="module")
def running(config: Config) -> Iterator[Running]:
    running = lifecycle.start(config, lambda news: None)
    pids = session_pids(running)
    assert len(pids) >= 5
    yield running
    pids |= session_pids(running)
    assert lifecycle.stop(config.state_dir)
    left = {pid: name_of(pid) for pid in pids if psutil.pid_exists(pid)}
    assert not left
    assert not session_pids(running)
    assert not Path(running.ray_dir).exists()
    assert lifecycle.find_running(config.state_dir) is None


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    assert running.address is not None
    with Client(running.address) as client:
        wait_for(lambda: client.status().load.num_running == 0)
        yield client


def test_only_the_engine_may_interrupt_others(client: Client, running: Running) -> None:
    status = client.status()
    engine = {status.decoder.pid, *(host.part.pid for host in status.expert_hosts)}
    for pid in session_pids(running):
        expected = os.SCHED_OTHER if pid in engine else os.SCHED_BATCH
        assert os.sched_getscheduler(pid) == expected, name_of(pid)


def test_a_host_that_finds_a_tensor_missing_ends_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Late: Ray runs, and the replica of a host reads the checkpoint."""
    model, missing = tmp_path / "model", "model.layers.2.experts.down_proj"
    shutil.copytree(DEMO_MODEL_DIR, model)
    tensors = load_file(model / "model.safetensors")
    del tensors[missing]
    save_file(tensors, model / "model.safetensors")
    file = tmp_path / "config.yaml"
    state_dir = tmp_path / "state"
    settings = {**SETTINGS, "model": str(model), "state_dir": str(state_dir)}
    file.write_text(json.dumps(settings))  # which is YAML too
    assert cli.main(["up", "--config", str(file)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error:") and "Traceback" not in said
    assert missing in "".join(said.split())
    assert lifecycle.find_running(state_dir) is None
    assert not (state_dir / "running.json").exists()


def test_the_cluster_says_what_the_engine_alone_says(config: Config, client: Client) -> None:
    torch.set_num_threads(1)  # the cluster's processes want the cores
    source = ModelSource.open(config)
    engine = load_engine(config, source, load_local_experts(config, source))
    assert engine.tokenizer is not None
    turns = [{"role": message.role, "content": message.content} for message in QUESTION]
    engine.add(
        request_id="alone",
        prompt_ids=engine.tokenizer.apply_chat_template(turns),
        sampling=SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True),
    )
    alone = []
    while engine.has_work:
        alone += [token for output in engine.step() for token in output.new_token_ids]
    assert answer(client) == alone


def test_a_format_holds_through_the_cluster(client: Client) -> None:
    sampling = Sampling(temperature=0.0, max_tokens=600, json_schema=json.dumps(SCHEMA))
    text = "".join(piece.text for piece in client.chat(QUESTION, sampling))
    assert set(json.loads(text)) == {"capital", "is_sure"}
    with pytest.raises(InvalidRequest, match="json_schema"):
        list(client.chat(QUESTION, Sampling(json_schema="{")))
    with pytest.raises(InvalidRequest, match="does not support thinking"):
        list(client.chat(QUESTION, Sampling(), thinking=True))


def test_openais_client_is_told_the_same(client: Client, running: Running) -> None:
    answers = openai.OpenAI(base_url=running.base_url, api_key="any", max_retries=0)
    chunks = answers.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": QUESTION[0].content}],
        temperature=0,
        stream=True,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    said = client.chat(QUESTION, Sampling(temperature=0.0))
    assert text == "".join(piece.text for piece in said) != ""


def test_each_host_has_a_card_of_its_own(client: Client) -> None:
    status = client.status()
    assert sorted(host.visible_devices for host in status.expert_hosts) == ["0", "1"]
    assert [list(host.group_ids) for host in status.expert_hosts] == [[0, 1, 2, 3]] * 2
    assert {host.link for host in status.expert_hosts} == {"shm"}
    assert status.expert_calls.num_calls > 0 and 0 <= status.expert_calls.hidden_share <= 1


def test_every_part_is_a_process_of_its_own_with_a_full_share(
    running: Running, client: Client
) -> None:
    pids = part_pids(client.status())
    assert len(pids) == 4 and set(pids) <= session_pids(running)
    assert [psutil.Process(pid).nice() for pid in pids] == [os.nice(0)] * 4
    environ = psutil.Process(client.status().decoder.pid).environ()
    assert environ.get("CUDA_VISIBLE_DEVICES", "") == ""


def part_pids(status: ClusterStatus) -> list[int]:
    hosts = [host.part.pid for host in status.expert_hosts]
    return [status.gateway.pid, status.decoder.pid, *hosts]


def test_everything_listens_on_loopback(running: Running, client: Client) -> None:
    """All but one port of each replica: Ray's own, which Ray's token protects."""
    exposed: dict[int, int] = {}
    for pid in session_pids(running):
        for connection in psutil.Process(pid).net_connections("inet"):
            is_listening = connection.status == psutil.CONN_LISTEN
            if is_listening and connection.laddr.ip not in LOOPBACK:
                exposed[pid] = exposed.get(pid, 0) + 1
    assert exposed == dict.fromkeys(part_pids(client.status()), 1)


def test_metrics_of_every_part(client: Client) -> None:
    status = client.status()
    hosts = [host.part.metrics_port for host in status.expert_hosts]
    slots = "expert_tokens_total"
    before = [metric(port, slots) for port in hosts]
    tokens = metric(status.decoder.metrics_port, "generated_tokens_total")
    calls = num_chats(status)
    answer(client, 4)
    assert all(metric(port, slots) > b for port, b in zip(hosts, before, strict=True))  # at once
    assert metric(status.decoder.metrics_port, "generated_tokens_total") == tokens + 4
    wait_for(lambda: num_chats(status) == calls + 1)
    wait_for(lambda: metric(status.decoder.metrics_port, "kv_blocks", state="unused") > 0)
    assert metric(status.decoder.metrics_port, "expert_link_up") == len(hosts)
    assert metric(status.decoder.metrics_port, "expert_call_duration_seconds_count") > 0


def test_prometheus_finds_every_part(config: Config, client: Client) -> None:
    groups = json.loads((config.state_dir / FILE).read_text())
    found = {group["labels"]["part"]: group["targets"] for group in groups}
    status = client.status()
    assert found == {
        "gateway": [f"127.0.0.1:{status.gateway.metrics_port}"],
        "decoder": [f"127.0.0.1:{status.decoder.metrics_port}"],
        **{h.host_id: [f"127.0.0.1:{h.part.metrics_port}"] for h in status.expert_hosts},
    }


def num_chats(status: ClusterStatus) -> float:
    return metric(status.gateway.metrics_port, "gateway_requests_total", method="Chat")


def test_cancelling_frees_the_blocks(client: Client) -> None:
    pieces = client.chat(QUESTION, greedy(900))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]  # a generator
    wait_for(lambda: not any(group.used for group in client.status().load.kv_blocks))


def test_commands_see_the_running_cluster(
    config: Config, running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--set", f"state_dir={config.state_dir}"]
    assert cli.main(["up", *at]) == 0
    assert "Already running" in capsys.readouterr().out
    assert cli.main(["status", *at]) == 0
    card = capsys.readouterr().out
    assert str(running.address) in card and "experts 0" in card and "attention" in card
    assert cli.main(["chat", *at, "--max-tokens", "4", "Hello!"]) == 0
    assert capsys.readouterr().out.strip()
    assert cli.main(["chat", *at, "--temperature", "-1", "Hello!"]) == 1
    assert "temperature" in capsys.readouterr().err


def test_killing_an_expert_host_changes_no_token(client: Client) -> None:
    undisturbed = answer(client, 200)
    before = client.status()
    host = before.expert_hosts[0]
    tokens: list[int] = []
    pieces: Iterator[Generation] = client.chat(QUESTION, greedy(200))
    for piece in pieces:
        tokens += piece.token_ids
        if len(tokens) >= 20:
            os.kill(host.part.pid, signal.SIGKILL)
            break
    num_early = len(tokens)
    tokens += [token for piece in pieces for token in piece.token_ids]
    assert tokens == undisturbed
    assert num_early < 150  # the host died in the middle of the answer
    num_retries = before.expert_calls.num_retries
    wait_for(lambda: client.status().expert_calls.num_retries > num_retries)
    wait_for(lambda: is_replaced(client.status(), host.part.pid), 60)  # Serve repairs it
    assert answer(client, 200) == undisturbed


def test_killing_every_expert_host_changes_no_token(client: Client) -> None:
    """The decoder computes the experts itself until Serve has replaced the hosts."""
    undisturbed = answer(client, 200)
    before = client.status()
    old_pids = [host.part.pid for host in before.expert_hosts]
    port = before.decoder.metrics_port
    num_fallbacks = metric(port, "expert_fallbacks_total")
    tokens: list[int] = []
    pieces: Iterator[Generation] = client.chat(QUESTION, greedy(200))
    for piece in pieces:
        tokens += piece.token_ids
        if len(tokens) == 20:
            for pid in old_pids:
                os.kill(pid, signal.SIGKILL)
        if len(tokens) > 20:
            assert client.status().ready
    assert tokens == undisturbed
    wait_for(lambda: metric(port, "expert_fallbacks_total") > num_fallbacks)
    wait_for(lambda: is_replaced(client.status(), *old_pids), 60)
    wait_for(lambda: not client.status().reason)
    assert answer(client, 200) == undisturbed


def is_replaced(status: ClusterStatus, *old_pids: int) -> bool:
    return status.ready and all(
        host.link and host.part.pid not in old_pids for host in status.expert_hosts
    )


def test_killing_the_decoder_and_all_hosts_is_said_and_repaired(client: Client) -> None:
    before = client.status()
    pieces = client.chat(QUESTION, greedy(900))
    next(pieces)
    for pid in part_pids(before)[1:]:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(Unavailable, match="decoder"):
        list(pieces)
    wait_for(lambda: not client.status().ready)
    wait_for(lambda: client.status().ready, 120)
    assert not set(part_pids(client.status())[1:]) & set(part_pids(before))
    assert len(answer(client)) == 48
