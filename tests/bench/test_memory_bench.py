"""The memory bench: what its parts make of their numbers, and a tiny run; no speed is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.lib.card import Check
from bench.lib.peers import NotMeasured
from bench.memory import __main__ as memory
from bench.memory import conversation, fetch_choice, kv_layout, restore, shaped_link, write_behind


def verdicts(checks: list[Check]) -> list[bool | None]:
    return [check.ok for check in checks]


def test_checks_survive_json() -> None:
    for check in (Check("a", 2.0, "x", 1.5), Check("b", None, "ms", 31.25, at_least=False)):
        assert Check.from_json(json.loads(json.dumps(check.to_json()))) == check


def test_a_way_that_takes_hardly_longer_is_right_too() -> None:
    one = {"compute_ms": [100, 100, 100], "fetch_ms": [109, 109, 400], "choice_ms": []}
    assert fetch_choice.faster(one) == fetch_choice.COMPUTE
    chosen = {"chosen": [fetch_choice.COMPUTE, fetch_choice.FETCH]}
    assert fetch_choice.right_choices(one | chosen) == [True, True]
    slow = {"fetch_ms": [120, 120, 120]}
    assert fetch_choice.right_choices(one | slow | chosen) == [True, False]


def test_choices_must_be_right_on_both_sides() -> None:
    short = {"compute_ms": [1], "fetch_ms": [9], "choice_ms": [1], "chosen": ["compute"]}
    long = {"compute_ms": [9], "fetch_ms": [1], "choice_ms": [1], "chosen": ["fetch"]}
    results: dict[str, Any] = {"raw_bytes_per_s": 1e8, "lengths": {"10": short, "20": long}}
    assert verdicts(fetch_choice.checks(results)) == [True, True]
    results["lengths"] = {"10": short}
    assert verdicts(fetch_choice.checks(results)) == [True, False]
    assert verdicts(fetch_choice.checks({"not_measured": "no namespaces"})) == [None]


def test_a_restore_is_held_to_the_link() -> None:
    one = {
        "cold_ms": [1000.0],
        "memory_ms": [19.0],
        "step_ms": 10.0,
        "memory_steps": 1.0,
        "redis_ms": [42.0],
        "redis_bytes": [10e6],  # 10 ms
    }
    results: dict[str, Any] = {"raw_bytes_per_s": 1e9, "lengths": {str(restore.CONTEXT): one}}
    found = restore.checks(results)
    assert found[0].target == pytest.approx(1.3 * 10 + 30)
    assert verdicts(found) == [True, True, True, True]
    results["lengths"][str(restore.CONTEXT)] = one | {"redis_ms": [300.0]}
    assert verdicts(restore.checks(results)) == [False, True, True, False]
    assert verdicts(restore.checks({"not_measured": "it did not start"})) == [None]


def test_growth_compares_runs_in_pairs() -> None:
    step_ms = {write_behind.WITHOUT: [10.0, 20.0, 10.0], write_behind.WITH: [10.1, 20.4, 30.0]}
    results = {"step_ms": step_ms, "bytes_per_run": [1e6]}
    assert write_behind.growth(results) == pytest.approx(2.0)
    assert verdicts(write_behind.checks(results)) == [True]


def test_one_row_must_be_half() -> None:
    one = {"memory_bytes": 1024.0, "payload_bytes": 1024.0, "usage_bytes": 1040.0}
    split = {what: 2048.0 for what in one}
    assert verdicts(kv_layout.checks({"values": one, "separate": split})) == [True, True, True]
    more = one | {"payload_bytes": 1025.0, "usage_bytes": 1050.0}
    assert verdicts(kv_layout.checks({"values": more, "separate": split})) == [True, False, False]


def test_a_conversation_goes_on_in_a_second_process(tmp_path: Path) -> None:
    from tests.support.gateway.echo_speaker import open_echo

    asked = [[1, 2], [3], [4], [5, 6]]
    turns = conversation.converse(open_echo, asked)
    assert [turn.num_prompt_tokens for turn in turns] == [2, 4, 6, 9]  # an answer has one token
    assert [turn.answer_ids for turn in turns] == [[2], [3], [4], [6]]
    assert len({turn.ttft_s for turn in turns}) == 2  # the echo tells its process id there


def test_there_is_no_far_server_outside_of_a_namespace() -> None:
    with pytest.raises(NotMeasured, match="namespaces"), shaped_link.far_server(["true"]):
        pass


def test_a_tiny_run_of_parts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    parts = ["kv_store", "redis_cases", "fetch_choice"]
    summary = memory.main(["--quick", "--no-keep", "--parts", *parts])
    assert list(summary["results"]) == parts
    cases = summary["results"]["redis_cases"]
    assert cases.keys() == {"values", "projection", "separate"}
    assert all(one["num_rows"] > 0 and one["num_unequal"] == 0 for one in cases.values())
    choice = summary["results"]["fetch_choice"]
    assert "namespace" in choice.get("not_measured", "") or choice["lengths"].keys() == {
        "128",
        "256",
    }
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary
