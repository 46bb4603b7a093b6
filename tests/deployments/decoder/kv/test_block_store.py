"""The engine's blocks in a real Redis: warm equals cold, and what is kept for whom."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.spec import KVLayout
from cluster.store.redis import RedisAddress
from cluster.store.scripts import tenant_prefix
from deployments.verify.random_cases import RandomCases
from tests.support.engine.invariant_subjects import Subject
from tests.support.engine.schedulers import evict_all
from tests.support.store.engines import BLOCK_SIZE, PROMPT, TEXT, Deployment
from tests.support.store.redis_servers import redis_server
from tests.support.waiting import wait_for


@pytest.mark.parametrize(
    ("name", "kv_layout"),
    [("26b", "values"), ("26b", "projection"), ("26b", "separate"), ("e2b", "values")],
)
def test_warm_from_redis_equals_cold(
    subjects: dict[str, Subject], address: RedisAddress, name: str, kv_layout: KVLayout
) -> None:
    deployment = Deployment(subjects[name], address)
    tally = RandomCases(deployment.runner, deployment.connect, kv_layout).run(10)
    assert tally.num_rows > 100 and tally.num_unequal == 0, tally
    assert min(tally.num_hits, tally.num_evicted, tally.num_restarts) > 2, tally
    assert deployment.count("reads", outcome="ok") > 10
    deployment.close()


def test_a_conversation_goes_on_after_a_restart(
    address: RedisAddress, deploy: Callable[..., Deployment]
) -> None:
    deployment = deploy(address)
    assert deployment.ask(PROMPT) == 0
    turn = PROMPT + deployment.cold(PROMPT)  # 107 tokens, the last of which was never computed
    deployment.start()
    assert deployment.ask([*turn, 7, 8, 9]) == 104
    evict_all(deployment.core.scheduler)
    assert deployment.ask([*turn, 9, 8, 7, 6, 5, 4]) == 104
    deployment.start()
    assert deployment.ask(PROMPT) == 100
    assert deployment.count("decisions", choice="fetch") == 3


def test_nothing_is_written_twice(address: RedisAddress, deploy: Callable[..., Deployment]) -> None:
    deployment = deploy(address)
    deployment.ask(PROMPT)
    turn = PROMPT + deployment.cold(PROMPT)
    deployment.start()
    deployment.ask(turn + TEXT[:5])
    evict_all(deployment.core.scheduler)
    deployment.ask(turn + TEXT[:5])
    assert deployment.blocks.flush(5)
    assert deployment.count("writes", outcome="present") == 0
    assert deployment.count("writes", outcome="written") == len(deployment.stored())


def test_a_session_needs_the_values_of_keys_of_and_no_others(
    address: RedisAddress, deploy: Callable[..., Deployment]
) -> None:
    deployment = deploy(address)
    request = deployment.add(PROMPT)
    deployment.finish(request)
    needed, left = set(deployment.blocks.keys_of(request)), deployment.stored()
    assert needed < left == set(deployment.blocks.traces_of(request))
    prefix = tenant_prefix("default") + b"kv:"
    deployment.redis.delete(*(prefix + key for key in left - needed))
    deployment.start()
    assert deployment.ask(PROMPT + deployment.cold(PROMPT) + [5]) == 104


def test_a_session_that_leaves_out_what_was_thought_resumes_before_it(
    address: RedisAddress, deploy: Callable[..., Deployment]
) -> None:
    deployment = deploy(address)
    request = deployment.add(PROMPT)
    deployment.finish(request)
    request.num_lasting_tokens = len(PROMPT) + 1  # the thought began with the second token
    needed, left = set(deployment.blocks.keys_of(request)), deployment.stored()
    assert needed < left
    prefix = tenant_prefix("default") + b"kv:"
    deployment.redis.delete(*(prefix + key for key in left - needed))
    deployment.start()
    answer = deployment.cold(PROMPT)
    assert deployment.ask([*PROMPT, answer[0], 5, 6, 7]) == len(PROMPT) // 4 * 4


def test_a_budget_takes_the_windows_of_earlier_turns_first(
    address: RedisAddress, deploy: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.decoder.kv.values.MAX_RUN_BLOCKS", 4)
    deployment = deploy(address, tenant_bytes=120_000)
    turn = PROMPT[:40]
    for word in range(2, 12):
        turn = [*turn, word, *deployment.cold([*turn, word])]
        deployment.ask(turn)
    assert deployment.count("writes", outcome="written") > len(deployment.stored())
    deployment.start()
    assert deployment.ask(turn) == (len(turn) - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_what_redis_missed_is_written_at_the_next_turn(
    tmp_path: Path, deploy: Callable[..., Deployment]
) -> None:
    deployment = deploy(RedisAddress(f"unix://{tmp_path}/redis.sock"))
    wait_for(lambda: not deployment.kv_store.is_up)
    deployment.ask(PROMPT)
    turn = PROMPT + deployment.cold(PROMPT)
    with redis_server(tmp_path):
        wait_for(lambda: deployment.kv_store.is_up)
        assert deployment.ask([*turn, 5]) == 104  # from memory
        deployment.start()
        turn += [5, *deployment.cold([*turn, 5])]
        assert deployment.ask([*turn, 6]) == 112


def test_what_somebody_removed_is_written_at_the_next_turn_once_that_is_told(
    address: RedisAddress, deploy: Callable[..., Deployment]
) -> None:
    deployment = deploy(address)
    deployment.ask(PROMPT)
    removed = deployment.stored()
    prefix = tenant_prefix("default") + b"kv:"
    deployment.redis.delete(*(prefix + key for key in removed))
    deployment.blocks.forget("default", removed)
    turn = PROMPT + deployment.cold(PROMPT)
    assert deployment.ask([*turn, 5]) == 104  # from memory
    deployment.start()
    turn += [5, *deployment.cold([*turn, 5])]
    assert deployment.ask([*turn, 6]) == 112


def test_what_a_full_server_refused_is_written_at_the_next_turn(
    address: RedisAddress, deploy: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.store.writer.RETRY_S", 0.1)
    monkeypatch.setattr("deployments.decoder.kv.values.MAX_RUN_BLOCKS", 4)
    deployment = deploy(address)
    deployment.redis.config_set("maxmemory", 1)
    deployment.ask(PROMPT)
    assert deployment.stored() == set()
    deployment.redis.config_set("maxmemory", 0)
    wait_for(lambda: deployment.kv_store.takes("default", 1))
    turn = PROMPT + deployment.cold(PROMPT)
    assert deployment.ask([*turn, 5]) == 104  # from memory
    assert deployment.count("writes", outcome="server_full") > 0
    deployment.start()
    turn += [5, *deployment.cold([*turn, 5])]
    assert deployment.ask([*turn, 6]) == 112


def test_tenants_share_only_where_both_opted_in(
    address: RedisAddress, deploy: Callable[..., Deployment]
) -> None:
    deployment = deploy(address)
    assert [deployment.ask(PROMPT, tenant) for tenant in ("a", "d", "b", "c")] == [0, 0, 0, 100]
    use = deployment.core.stats().prefix_stats
    assert {tenant: u.num_hits for tenant, u in use.items()} == {"a": 0, "d": 0, "b": 0, "c": 1}
    assert not deployment.stored("a") & deployment.stored("d")
    deployment.start()
    assert deployment.ask(PROMPT, "e") == 0
    assert deployment.count("decisions", choice="fetch") == 0
    assert deployment.ask(PROMPT, "a") == 100
