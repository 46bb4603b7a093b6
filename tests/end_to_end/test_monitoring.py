"""Dashboards and alerts against a real Prometheus that scrapes a live cluster under load."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from cluster.config import Config
from cluster.errors import PermissionDenied
from cluster.metrics import LABELS, METRICS
from deployments import cli
from deployments.commands.access import Access
from deployments.commands.client import Client
from deployments.commands.connect import connect_here
from deployments.gateway.scrape_targets import FILE
from deployments.start import lifecycle
from protos.briolette.v1.admin_pb2 import Tenant
from protos.briolette.v1.inference_pb2 import ChatRequest, CompleteRequest, Message, Sampling
from protos.briolette.v1.inference_pb2_grpc import InferenceStub
from tests.support.prometheus import RULES, Prometheus, find, needs_prometheus, running_prometheus
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[2]
ALERT_TESTS = ROOT / "tests/alerts.yaml"
DASHBOARDS = [
    json.loads(path.read_text())
    for path in sorted((ROOT / "helm/briolette/dashboards").glob("*.json"))
]
OR_ZERO = " or on() vector(0)"  # for a cluster in which nothing happened yet; here, all does
OURS = {spec.name: set(spec.labels) for spec in METRICS}
FOREIGN = {"up", "process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"}
SETTINGS = {
    "gateway": {"port": 0, "metrics_port": 0, "auth": "keys"},
    "engine": {"kv_bytes": 64 << 20, "max_model_len": 1024, "checkpoint_blocks": 4},
    "experts": {"num_copies": 2, "num_gpus_per_host": 1},
    "ray": {"num_gpus": 2},
    "device": "cpu",
}
SAMPLING = Sampling(temperature=0.0, max_tokens=24, ignore_eos=True)
LONG = "Please remember that the code of Anna is 4821. " * 12


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries() -> list[tuple[str, str]]:
    """Where each query stands, and the query."""
    return [
        (f"{dashboard['title']} / {panel['title']} / {target['refId']}", target["expr"])
        for dashboard in DASHBOARDS
        for panel in panels(dashboard)
        for target in panel["targets"]
    ]


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


# What can be said without a cluster


def test_dashboards_can_be_imported() -> None:
    assert {board["uid"] for board in DASHBOARDS} == {
        f"briolette-{name}" for name in ("overview", "tenants", "experts", "memory")
    }
    for board in DASHBOARDS:
        assert board["schemaVersion"] >= 36 and board["title"].startswith("Briolette")
        names = {variable["name"] for variable in board["templating"]["list"]}
        text = json.dumps(board)
        used = set(re.findall(r"\$\{?([a-z]\w*)", text)) - {"datasource"}
        assert used <= names and "datasource" in names
        cells: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            at = panel["gridPos"]
            area = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
            assert at["x"] + at["w"] <= 24 and not cells & area, "panels overlap"
            cells |= area
        assert all(panel["targets"] and panel["title"] for panel in panels(board))


@pytest.mark.parametrize(
    "expression", [*[query for _, query in queries()], *[rule["expr"] for rule in alerts()]]
)
def test_queries_use_metrics_and_labels_that_exist(expression: str) -> None:
    names = set(re.findall(r"\bbriolette_\w+|\bup\b|\bprocess_\w+", expression))
    assert names
    for name in names - FOREIGN:
        metric = name if name in OURS else re.sub("_(bucket|sum|count)$", "", name)
        assert metric in OURS
        for selector in re.findall(rf"\b{name}{{([^}}]*)}}", expression):
            assert set(re.findall(r"(\w+)(?:=~|=|!=)", selector)) <= OURS[metric]
        grouped = re.findall(r"by \(([^)]*)\)", expression)
        known = set(LABELS) | {"le", "part"}
        assert all(set(re.split(r",\s*", labels)) <= known for labels in grouped)


def test_every_alert_says_what_to_do_and_is_tested() -> None:
    tested = ALERT_TESTS.read_text()
    for rule in alerts():
        assert rule["for"] and rule["labels"]["severity"] in ("critical", "warning", "info")
        summary, description = rule["annotations"]["summary"], rule["annotations"]["description"]
        assert summary.endswith(".") and len(description) > 100
        expectations = re.findall(
            rf"expr: 'ALERTS{{alertname=\"{rule['alert']}\"[^']*'(,?)", tested
        )
        assert {",", ""} <= set(expectations), f"{rule['alert']} must fire, and not fire"


@needs_prometheus
def test_promtool_accepts_the_rules_and_their_tests() -> None:
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(ALERT_TESTS)]):
        done = subprocess.run([str(find("promtool")), *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# A live cluster


class Load:
    """A client of each tenant that asks all the time, and one that nobody let in; ends with a
    `with` block.
    """

    def __init__(self, address: str, keys: dict[str, str]) -> None:
        self.request_ids: dict[str, set[str]] = {tenant: set() for tenant in keys}
        self._address = address
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=item, daemon=True) for item in keys.items()
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(30)

    def _run(self, tenant: str, key: str) -> None:
        with grpc.insecure_channel(self._address) as channel:
            stub, shown, turn = InferenceStub(channel), (("authorization", f"Bearer {key}"),), 0
            while not self._end.is_set():
                turn += 1
                text = f"{LONG if turn % 2 else ''}This is {tenant}'s question {turn}?"
                request = ChatRequest(
                    messages=[Message(role="user", content=text)], sampling=SAMPLING
                )
                pieces = list(stub.Chat(request, timeout=30, metadata=shown))
                self.request_ids[tenant].add(pieces[0].request_id)
                self._misbehave(stub, shown)

    def _misbehave(self, stub: InferenceStub, shown: tuple[tuple[str, str], ...]) -> None:
        request = CompleteRequest(text="Anna", sampling=SAMPLING)
        stream = stub.Complete(request, metadata=shown)
        next(stream)
        stream.cancel()
        for refused, metadata in ((CompleteRequest(), shown), (request, ())):
            with pytest.raises(grpc.RpcError):
                stub.CompleteOnce(refused, metadata=metadata)


@contextmanager
def running_cluster() -> Iterator[tuple[Config, str, dict[str, str]]]:
    """A cluster with two tenants: its address, and their keys."""
    with tempfile.TemporaryDirectory() as folder:  # a short path: sockets lie there
        config = Config.load(None, {**SETTINGS, "state_dir": folder})
        running = lifecycle.start(config, lambda news: None)
        try:
            assert running.address is not None
            with connect_here(config) as operator:
                keys = {name: operator.create_tenant(Tenant(name=name)) for name in ("ann", "bob")}
            yield config, running.address, keys
        finally:
            lifecycle.stop(config.state_dir)


def chosen(query: str, variables: dict[str, str]) -> str:
    """A query as Grafana sends it."""
    for name, value in {**variables, "__rate_interval": "10s"}.items():
        query = query.replace(f"${name}", value)
    return query


def values_of(prometheus: Prometheus, definition: str) -> str:
    """What a variable offers, all of it chosen: `label_values(metric, label)`."""
    match = re.fullmatch(r"label_values\((.+), (\w+)\)", definition)
    assert match is not None
    metric, label = match.groups()
    found = prometheus.query(f"group by ({label}) ({metric.replace('$model', '.*')})")
    return "|".join(sorted(labels[label] for labels, _ in found))


def without_data(prometheus: Prometheus) -> dict[str, object]:
    """What is wrong with each query that doesn't give numbers."""
    wrong: dict[str, object] = {}
    for board in DASHBOARDS:
        variables = {
            variable["name"]: values_of(prometheus, variable["query"]["query"])
            for variable in board["templating"]["list"]
            if variable["type"] == "query"
        }
        if not all(variables.values()):
            wrong[board["title"]] = variables
            continue
        for panel in panels(board):
            for target in panel["targets"]:
                query = chosen(target["expr"], variables)
                found = prometheus.query(query.removesuffix(OR_ZERO))
                values = [value for _, value in (*found, *prometheus.query(query))]
                if not found or not all(map(math.isfinite, values)):
                    wrong[f"{board['title']} / {panel['title']}: {query}"] = found
    return wrong


@needs_prometheus
@pytest.mark.cluster
def test_every_panel_has_data_and_every_request_a_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_cluster() as (config, address, keys):
        targets = config.state_dir / FILE
        with running_prometheus(tmp_path, targets) as prometheus, Load(address, keys) as load:
            give_up_at = time.monotonic() + 40
            while wrong := without_data(prometheus):
                assert time.monotonic() < give_up_at, json.dumps(wrong, indent=1)
                time.sleep(1)
            assert prometheus.query('ALERTS{alertstate="firing"}') == []
        lines = check_log(config, load)
        check_usage(config, address, keys, lines)
        assert cli.main(["usage", "--csv", "--set", f"state_dir={config.state_dir}"]) == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert [row["tenant"] for row in rows] == ["ann", "bob"]


def check_log(config: Config, load: Load) -> list[dict[str, Any]]:
    """Every request that a client saw has a line, and so has everything that was refused."""
    wait_for(lambda: is_idle(config))  # what was cancelled has ended too
    text = (config.state_dir / "logs/requests.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    by_id = {line.get("request_id"): line for line in lines}
    for tenant, request_ids in load.request_ids.items():
        assert request_ids
        for request_id in request_ids:
            line = by_id[request_id]
            assert (line["tenant"], line["status"], line["output_tokens"]) == (tenant, "OK", 24)
    assert {"unauthenticated", "invalid_request"} <= {line["error"] for line in lines}
    assert "Anna" not in text
    return lines


def check_usage(
    config: Config, address: str, keys: dict[str, str], lines: list[dict[str, Any]]
) -> None:
    """The operator sees both tenants, each tenant itself, and it is what the log says."""
    with connect_here(config) as operator:
        days = operator.usage()
    assert [day.tenant for day in days] == ["ann", "bob"]
    for day in days:
        with Client(address, Access(keys[day.tenant])) as client:
            assert list(client.usage()) == [day]
            with pytest.raises(PermissionDenied):
                client.usage("ann" if day.tenant == "bob" else "bob")
        own = [line for line in lines if line.get("model") and line["tenant"] == day.tenant]
        assert day.requests == len(own)
        answered = [line for line in own if line["status"] == "OK"]
        for name in ("prompt_tokens", "output_tokens", "cached_tokens"):
            assert getattr(day, name) >= sum(line[name] for line in answered) > 0
        assert day.saved_prefill_s > 0


def is_idle(config: Config) -> bool:
    with connect_here(config) as operator:
        load = operator.status().load
    return load.num_running + load.num_waiting == 0
