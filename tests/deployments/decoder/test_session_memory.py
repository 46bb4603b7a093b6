"""What memory holds for a session: found, freed by itself, and nothing of others with it."""

from __future__ import annotations

import pytest

from cluster.spec import AttentionKind
from engine.core import EngineCore
from tests.support.engine.fake_engine import GREEDY, drain, make_core
from tests.support.engine.schedulers import evict_all, make_request, make_scheduler, run_step

GLOBAL, SLIDING = AttentionKind.GLOBAL, AttentionKind.SLIDING
DOCUMENT = [(7 * i * i + 3 * i) % 60 for i in range(40)]  # ten blocks; a window needs two


def turn(
    core: EngineCore, session: str | None, prompt: list[int], tenant: str = "default"
) -> tuple[list[int], int]:
    """The conversation after this turn, and how much of the prompt was cached."""
    core.add(request_id="r", prompt_ids=prompt, sampling=GREEDY, session=session, tenant=tenant)
    outputs = drain(core)["r"]
    core.check_integrity()
    answer = [token for output in outputs for token in output.new_token_ids]
    return [*prompt, *answer], outputs[-1].num_cached_tokens


def num_cached(core: EngineCore) -> int:
    return sum(core.stats().num_cached_blocks.values())


def test_dropping_the_only_session_frees_all_that_memory_held() -> None:
    core = make_core()
    said, _ = turn(core, "trip", DOCUMENT[:18])
    turn(core, "trip", [*said, 5, 6, 7])
    held = num_cached(core)
    assert core.session_tokens("default") == {"trip": 36} and held > 0
    assert core.drop_session("default", "trip") == held  # a block counts as one byte here
    core.check_integrity()
    assert num_cached(core) == 0 and core.session_tokens("default") == {}
    assert core.drop_session("default", "trip") == 0


def test_what_another_session_or_prompt_resumes_from_stays() -> None:
    core = make_core()
    shared = DOCUMENT[:24]
    ends: dict[str | None, list[int]] = {}
    for name in ("first", "second", None):
        ends[name], _ = turn(core, name, [*shared, len(ends), 1, 2])
    before = num_cached(core)
    assert core.drop_session("default", "first") == before - num_cached(core) > 0
    core.check_integrity()
    assert turn(core, "second", [*ends["second"], 9])[1] == 32
    assert turn(core, None, [*ends[None], 9])[1] == 32
    assert turn(core, "first", [*ends["first"], 9])[1] == 24  # what the three have in common


def test_a_checkpoint_from_which_a_second_session_resumed_is_also_its_own() -> None:
    core = make_core()
    said, _ = turn(core, "first", DOCUMENT[:18])
    assert turn(core, "second", [*said, 9])[1] == 24
    core.drop_session("default", "first")
    core.check_integrity()
    assert turn(core, "third", [*said, 8])[1] == 24


def test_a_cancelled_turn_goes_with_its_session() -> None:
    core = make_core(max_num_batched_tokens=8)
    said, _ = turn(core, "trip", DOCUMENT[:18])
    core.add(request_id="r", prompt_ids=[*said, *DOCUMENT[:20]], sampling=GREEDY, session="trip")
    for _ in range(3):
        core.step()
    core.abort("r")
    drain(core)
    assert core.session_tokens("default")["trip"] > len(said)
    core.drop_session("default", "trip")
    core.check_integrity()
    assert num_cached(core) == 0


def test_what_a_running_request_reads_is_not_taken_from_it() -> None:
    core = make_core()
    said, _ = turn(core, "trip", DOCUMENT[:18])
    request = core.add(request_id="r", prompt_ids=[*said, 9], sampling=GREEDY, session="trip")
    core.step()
    core.drop_session("default", "trip")
    core.check_integrity()
    expected = make_core()
    expected.add(request_id="r", prompt_ids=[*said, 9], sampling=GREEDY)
    drain(core)
    tokens = [token for output in drain(expected)["r"] for token in output.new_token_ids]
    assert request.output_ids == tokens


def test_tenants_have_sessions_of_the_same_name() -> None:
    core = make_core()
    for tenant in ("a", "b"):
        turn(core, "trip", DOCUMENT[:18], tenant)
    core.drop_session("a", "trip")
    assert core.session_tokens("a") == {} and core.session_tokens("b") == {"trip": 24}


def test_what_was_evicted_is_nobodys() -> None:
    core = make_core()
    turn(core, "trip", DOCUMENT[:18])
    evict_all(core.scheduler)
    assert core.session_tokens("default") == {} and core.drop_session("default", "trip") == 0


@pytest.mark.parametrize("kinds", [(GLOBAL,), (SLIDING,)])
def test_models_with_one_kind_of_layers(kinds: tuple[AttentionKind, ...]) -> None:
    scheduler = make_scheduler(kinds=kinds, window=8)
    for name, length in (("first", 11), ("second", 27)):
        request = make_request(name, length, 6)
        request.session = name
        scheduler.add(request)
        while scheduler.running or scheduler.waiting:
            run_step(scheduler)
    for name in ("second", "first"):
        assert scheduler.kv.drop(("default", name)) > 0
        scheduler.check_integrity()
    assert all(group.pool.num_cached == 0 for group in scheduler.kv.groups.values())
