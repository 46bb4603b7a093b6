"""What Prometheus sees of a day's work: an answer, a cancel, a deadline, a preemption, a retry."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from deployments.expert_host.meter import HostMeter
from protos.briolette.v1.inference_pb2_grpc import InferenceStub
from tests.support.engine.tiny_models import make_tiny
from tests.support.experts.hosted_experts import hosted_experts
from tests.support.gateway.fake_decoder import Decoder, make_tokenizer
from tests.support.gateway.requests import complete
from tests.support.gateway.running import running_gateway, serving
from tests.support.waiting import wait_for

NUM_BLOCKS = 40  # of 16 tokens: room for one request of the longest context, not for two
NUM_TOKENS, TOP_K = 20, 3  # of an expert call


class Shown:
    """The samples of a registry."""

    def __init__(self, registry: CollectorRegistry, **labels: str) -> None:
        self.registry, self.labels = registry, labels

    def __call__(self, name: str, **labels: str) -> float:
        """A sample's value; 0 for one that isn't there yet."""
        labels = {**self.labels, **labels}
        return self.registry.get_sample_value(f"briolette_{name}", labels) or 0.0


class Parts:
    """A gateway and a decoder, and what they show."""

    def __init__(self, decoder: Decoder, stub: InferenceStub, gateway: CollectorRegistry) -> None:
        self.decoder, self.stub = decoder, stub
        self.gateway = Shown(gateway, tenant="default")
        self.engine = Shown(decoder.registry, model="counter")
        self.tenant = Shown(decoder.registry, model="counter", tenant="default")

    def wait_for(self, shown: Shown, name: str, value: float, **labels: str) -> None:
        """Gauges and some counters are refreshed once a second, and when the loop is woken."""

        def is_shown() -> bool:
            self.decoder.loop.wake()
            return shown(name, **labels) == value

        wait_for(is_shown)


@pytest.fixture
def parts() -> Iterator[Parts]:
    tokenizer, registry = make_tokenizer(), CollectorRegistry()
    decoder = Decoder(tokenizer, num_blocks=NUM_BLOCKS)
    with running_gateway(tokenizer, decoder.find, registry=registry) as gateway:
        wait_for(lambda: serving(gateway))
        with grpc.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
            yield Parts(decoder, InferenceStub(channel), registry)
    decoder.close()


def test_an_answer(parts: Parts) -> None:
    assert parts.stub.CompleteOnce(complete("abc", max_tokens=8)).text == "defghijk"
    shown = parts.tenant
    assert shown("prompt_tokens_total") == 3
    assert shown("generated_tokens_total") == 8
    assert shown("requests_total", reason="length") == 1
    assert shown("queue_time_seconds_count") == shown("time_to_first_token_seconds_count") == 1
    assert shown("inter_token_latency_seconds_count") == 7
    assert shown("request_duration_seconds_count") == 1
    whole_s = shown("request_duration_seconds_sum")
    ttft_s = shown("time_to_first_token_seconds_sum")
    itl_s = shown("inter_token_latency_seconds_sum")
    assert 0 < shown("queue_time_seconds_sum") <= ttft_s
    assert ttft_s + itl_s == pytest.approx(whole_s)
    parts.wait_for(parts.engine, "step_duration_seconds_count", 8)
    assert 0 < parts.engine("step_duration_seconds_sum") <= whole_s
    parts.wait_for(parts.engine, "computed_tokens_total", 3, phase="prefill")
    parts.wait_for(parts.engine, "computed_tokens_total", 7, phase="decode")
    wait_for(lambda: parts.gateway("gateway_streams", method="CompleteOnce") == 0)
    assert parts.gateway("gateway_requests_total", method="CompleteOnce", status="OK") == 1


def test_streams_that_wait_and_run_and_are_cancelled(parts: Parts) -> None:
    parts.decoder.runner.step_s = 0.02
    calls = [parts.stub.Complete(complete(max_tokens=100)) for _ in range(6)]  # 4 run at a time
    parts.wait_for(parts.engine, "requests_running", 4)
    parts.wait_for(parts.engine, "requests_waiting", 2)
    assert parts.gateway("gateway_streams", method="Complete") == 6
    for call in calls:
        call.cancel()
    labels = {"method": "Complete", "reason": "client"}
    wait_for(lambda: parts.gateway("gateway_aborted_total", **labels) == 6)
    assert parts.gateway("gateway_streams", method="Complete") == 0
    wait_for(lambda: parts.tenant("requests_total", reason="abort") == 6)
    parts.wait_for(parts.engine, "requests_running", 0)
    parts.wait_for(parts.engine, "requests_waiting", 0)


def test_a_deadline(parts: Parts) -> None:
    parts.decoder.runner.step_s = 0.02
    with pytest.raises(grpc.RpcError):
        parts.stub.CompleteOnce(complete(max_tokens=400), timeout=0.2)
    labels = {"method": "CompleteOnce"}
    wait_for(lambda: parts.gateway("gateway_streams", **labels) == 0)
    ended = parts.gateway("gateway_requests_total", **labels, status="DEADLINE_EXCEEDED")
    assert ended == 1
    assert parts.gateway("gateway_aborted_total", **labels, reason="deadline") == 1
    wait_for(lambda: not parts.decoder.engine.has_work)


def test_a_preemption(parts: Parts) -> None:
    def ask(prompt: str) -> Any:
        return parts.stub.CompleteOnce(complete(prompt * 250, max_tokens=200))

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(ask, "ab"))
    assert [len(answer.token_ids) for answer in answers] == [200, 200]
    num_preemptions = parts.decoder.engine.stats().num_preemptions
    assert num_preemptions > 0
    parts.wait_for(parts.engine, "preemptions_total", num_preemptions)


def test_an_expert_call_and_a_retry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hosted_experts(make_tiny("26b", tmp_path / "model"), num_copies=2) as experts:
        hosts = [experts.start("host0"), experts.start("host1")]
        meters = [HostMeter(host, experts.placement.groups, "m") for host in hosts]
        host_shown = [Shown(meter.registry, model="m", layer="0") for meter in meters]
        experts.experts.wait_ready(30)
        shown = Shown(experts.registry, model="m")

        def num_calls(host_id: str) -> float:
            return shown("expert_call_duration_seconds_count", host=host_id)

        def num_slots() -> list[float]:
            pairs = zip(hosts, host_shown, strict=True)
            return [seen("expert_tokens_total", host=host.host_id) for host, seen in pairs]

        experts.call()
        assert num_calls("host0") == num_calls("host1") == 1
        assert sum(num_slots()) == NUM_TOKENS * TOP_K and min(num_slots()) > 0
        assert experts.status().ready
        assert shown("placement_epoch") == experts.placement.epoch > 0
        waited_s = shown("expert_wait_seconds_total")
        assert waited_s == experts.experts.router.stats().waited_s > 0
        assert shown("expert_link_up", host="host0") == 1

        def breaks(*_: object) -> None:
            raise ValueError("a bug")

        monkeypatch.setattr(hosts[0], "_compute", breaks)
        experts.call()
        experts.status()
        assert shown("expert_retries_total", host="host0") == 1
        assert shown("expert_retries_total", host="host1") == 0
        assert (num_calls("host0"), num_calls("host1")) == (1, 3)
        assert sum(num_slots()) == 2 * NUM_TOKENS * TOP_K
        assert shown("expert_wait_seconds_total") > waited_s
