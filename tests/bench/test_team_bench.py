"""The team bench: what its parts make of their numbers, and that each can run alone."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from bench.team import __main__ as team
from bench.team import soak
from bench.team.soak import Tally
from protos.briolette.v1.admin_pb2 import ClusterStatus, EngineLoad, KvBlocks

MIB = 1 << 20


def summary(outcomes: list[str], rss: list[dict[int, int]], load: EngineLoad) -> dict[str, Any]:
    tally = Tally(rss=rss, names={1: "gateway", 2: "host", 3: "host"})
    for outcome in outcomes:
        tally.note(outcome)
    return soak.summarize(tally, ClusterStatus(load=load))


def missed(results: dict[str, Any]) -> list[str]:
    return [check.name for check in soak.checks(results) if not check.ok]


def test_a_good_run_keeps_every_promise() -> None:
    rss = [{1: 100 * MIB}] * 5 + [{1: 101 * MIB}] * 5
    good = summary(["done"] * 9 + ["cancelled"], rss, EngineLoad())
    assert missed(good) == []
    assert soak.card(good | {"num_streams": 1, "seconds": 1.0})


@pytest.mark.parametrize(
    ("outcomes", "name"),
    [
        (["refused"] * 10, "requests answered to the end, share"),
        (["done"] * 9 + ["error: INTERNAL: it broke"], "errors"),
        (["done"] * 9 + ["lost"], "requests without an end"),
    ],
)
def test_what_ends_otherwise_is_told(outcomes: list[str], name: str) -> None:
    assert missed(summary(outcomes, [{1: MIB}] * 10, EngineLoad())) == [name]


def test_what_is_left_is_told() -> None:
    grows = [{1: 100 * MIB}] * 9 + [{1: 103 * MIB}]
    assert missed(summary(["done"], grows, EngineLoad())) == ["memory growth"]
    dies = [{1: MIB, 2: MIB}] * 9 + [{1: MIB, 3: MIB}]
    assert missed(summary(["done"], dies, EngineLoad())) == ["processes that ended"]
    load = EngineLoad(num_running=1, kv_blocks=[KvBlocks(group="global", used=3)])
    still = [{1: MIB}] * 10
    assert missed(summary(["done"], still, load)) == ["requests left", "KV blocks left"]


def test_nothing_measured_is_nothing_kept() -> None:
    assert {check.ok for check in soak.checks({"not_measured": "no cluster"})} == {None}


@pytest.mark.parametrize("name", team.PARTS)
def test_each_part_is_a_bench_of_its_own(name: str) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"bench.team.{name}").main(["--help"])
    assert ended.value.code == 0
