"""The engine's blocks in a Redis where something breaks: nothing of it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.store.redis import RedisAddress
from cluster.store.scripts import tenant_prefix
from deployments.decoder.kv.copies import BlockCopier
from engine.batch import Batch
from engine.core import Runner
from engine.request import RequestState
from tests.support.engine.fake_engine import drain
from tests.support.store.engines import PROMPT, TEXT, Deployment
from tests.support.store.redis_servers import redis_server


def test_damaged_and_missing_values_are_computed(
    address: RedisAddress, deploy: Callable[..., Deployment]
) -> None:
    deployment = deploy(address)
    request = deployment.add(PROMPT)
    deployment.finish(request)
    assert deployment.blocks.flush(5)
    prefix = tenant_prefix("default") + b"kv:"
    for key in deployment.stored():
        if key[:1] == b"S":
            deployment.redis.setrange(prefix + key, 1000, b"?")
    deployment.start()
    assert deployment.ask(PROMPT) == 0
    assert deployment.count("reads", outcome="damaged") > 0
    deployment.start()
    assert deployment.ask(PROMPT) == 100  # the damaged ones were written anew

    deployment.start()
    request = deployment.add(PROMPT)
    deployment.wait_for_lookup()
    deployment.redis.flushall()
    assert deployment.finish(request) == 0
    assert deployment.count("reads", outcome="missing") > 0


def test_redis_dies_between_its_promise_and_the_values(
    address: RedisAddress, deploy: Callable[..., Deployment]
) -> None:
    deployment = deploy(address)
    deployment.ask(PROMPT)
    deployment.start()
    request = deployment.add(PROMPT)
    deployment.wait_for_lookup()
    deployment.redis.shutdown(nosave=True)
    assert deployment.finish(request) == 0
    assert deployment.count("reads", outcome="unreachable") > 0
    assert not deployment.kv_store.is_up
    request = deployment.add(PROMPT[::-1])
    assert request.state is RequestState.WAITING  # nobody waits for what is known to be away
    deployment.finish(request)


def test_a_full_server_costs_nothing_but_warmth(
    tmp_path: Path, deploy: Callable[..., Deployment]
) -> None:
    with redis_server(tmp_path, "--maxmemory", "1", "--maxmemory-policy", "noeviction") as address:
        deployment = deploy(address)
        assert deployment.ask(PROMPT) == 0
        assert deployment.blocks.flush(5)
        assert deployment.count("writes", outcome="server_full") > 0
        assert not deployment.kv_store.status.is_writable
        deployment.start()
        assert deployment.ask(PROMPT) == 0


def test_what_the_queue_doesnt_take_is_not_copied(
    address: RedisAddress, deploy: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(address)
    monkeypatch.setattr(deployment.kv_store, "takes", lambda tenant, num_bytes: False)
    monkeypatch.delattr("deployments.decoder.kv.copies.BlockCopier.read")
    assert deployment.ask(PROMPT) == 0 and not deployment.stored()


def test_without_memory_to_read_into_it_computes(
    address: RedisAddress, deploy: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(address)
    deployment.ask(PROMPT)
    deployment.start()

    def memory(copier: BlockCopier, num_blocks: int) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(BlockCopier, "memory", memory)
    assert deployment.ask(PROMPT) == 0


def test_two_that_need_much_memory_read_one_after_the_other(
    address: RedisAddress, deploy: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(address)
    for prompt in (PROMPT, PROMPT[::-1]):
        deployment.ask(prompt)
    deployment.start()
    monkeypatch.setattr("deployments.decoder.kv.fetches.READING_BYTES", 1)
    first, second = (
        deployment.add(PROMPT, request_id="1"),
        deployment.add(PROMPT[::-1], request_id="2"),
    )
    outputs = drain(deployment.core)
    assert [outputs[r.request_id][-1].num_cached_tokens for r in (first, second)] == [100, 100]
    assert deployment.count("decisions", choice="fetch") == 2


def test_nothing_of_an_unsound_request_stays(
    address: RedisAddress, deploy: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what it wrote before its logits showed it, nor what it had read."""
    monkeypatch.setattr("deployments.decoder.kv.values.MAX_RUN_BLOCKS", 4)
    deployment = deploy(address)
    deployment.ask(TEXT[50:100])
    others = deployment.stored()

    def fail(prompt: list[int]) -> int:
        """How many tokens of it came from Redis."""
        deployment.start(max_num_batched_tokens=32)
        deployment.core.runner = Unsound(deployment.core.runner)
        request = deployment.add(prompt)
        while not request.num_computed_tokens:
            deployment.core.step()
        assert deployment.stored() > others
        [output] = drain(deployment.core)["r"]
        assert output.error is not None
        return output.num_cached_tokens

    assert fail(PROMPT) == 0 and deployment.stored() == others
    deployment.start()
    assert deployment.ask(PROMPT) == 0
    assert fail([*PROMPT, *TEXT[:40]]) == 100
    deployment.start()
    assert deployment.ask(PROMPT) == 0


class Unsound:
    """A runner whose logits are NaN."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def execute(self, batch: Batch) -> Tensor:
        return self._runner.execute(batch) * torch.nan


def test_blocks_that_cannot_be_copied_are_not_stored(
    address: RedisAddress,
    deploy: Callable[..., Deployment],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def no_memory(self: BlockCopier, block_ids: Sequence[int]) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    deployment = deploy(address)
    with monkeypatch.context() as patch:
        patch.setattr(BlockCopier, "read", no_memory)
        assert deployment.ask(PROMPT) == 0
        deployment.add([*PROMPT, *PROMPT])
        deployment.core.step()
        deployment.core.abort("r")
        drain(deployment.core)
    assert "can't be copied for the KV store" in caplog.text
    assert not deployment.stored()
    assert deployment.ask([*PROMPT, *PROMPT]) > 0  # from memory, and now it is stored
    assert deployment.stored()
