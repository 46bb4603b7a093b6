"""Blocks in Redis that are slower to fetch than to compute, or must wait for others."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from cluster.store.rates import RateMeter, Rates
from cluster.store.redis import RedisAddress
from tests.support.store.engines import GREEDY, PROMPT, Deployment
from tests.support.store.stores import pause


def test_a_slow_link_makes_it_compute(
    address: RedisAddress, deploy: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(address)
    deployment.ask(PROMPT)
    monkeypatch.setattr(RateMeter, "rates", Rates(10_000.0, 0.0))
    deployment.prefill_rate = 50.0  # two seconds, and the values take ten
    deployment.start()
    assert deployment.ask(PROMPT) == 0
    deployment.prefill_rate = 1.0
    deployment.start()
    assert deployment.ask(PROMPT) == 100
    assert deployment.count("decisions", choice="recompute") == 1
    assert deployment.count("decisions", choice="fetch") == 1


def test_a_read_that_lasts_longer_than_computing_is_given_up(
    address: RedisAddress, deploy: Callable[..., Deployment]
) -> None:
    deployment = deploy(address)
    deployment.ask(PROMPT)
    deployment.prefill_rate = 500.0
    deployment.start()
    request = deployment.add(PROMPT)
    pause(address, 1.8)
    started_s = time.monotonic()
    assert deployment.finish(request) in (0, 100)
    assert time.monotonic() - started_s < 0.9
    assert deployment.count("decisions", choice="given_up") == 1


def test_what_is_faster_to_compute_than_to_ask_for_is_not_asked_for(
    address: RedisAddress, deploy: Callable[..., Deployment]
) -> None:
    deployment = deploy(address)
    deployment.ask(PROMPT)
    deployment.prefill_rate = 1e9
    deployment.start()
    assert deployment.ask(PROMPT) == 0
    assert sum(deployment.count("decisions", choice=c) for c in ("fetch", "recompute")) == 0


def test_a_request_reads_from_redis_while_it_waits_for_others(
    address: RedisAddress, deploy: Callable[..., Deployment]
) -> None:
    """For longer than computing it would take: that clock doesn't run before anybody has looked."""
    deployment = deploy(address)
    deployment.ask(PROMPT)
    deployment.start(max_num_seqs=1)
    deployment.core.add(request_id="first", prompt_ids=[9] * 40, sampling=GREEDY)
    deployment.core.step()
    deployment.prefill_rate = 1000.0  # a tenth of a second
    request = deployment.add(PROMPT)
    time.sleep(0.3)
    assert deployment.finish(request) == 100
    assert deployment.count("decisions", choice="given_up") == 0
