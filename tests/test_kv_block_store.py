"""The engine's blocks in a real Redis: warm equals cold, and nothing that breaks there shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from bench.warm_cold import WarmCold, make_texts
from cluster.config import StoreConfig
from cluster.kv_keys import tenant_prefix
from cluster.kv_rates import RateMeter, Rates
from cluster.kv_store import KVStore
from cluster.metrics import Metrics
from cluster.redis import RedisAddress
from cluster.spec import AttentionKind, KVRows
from deployments.kv.block_store import KVBlockStore, kv_tensors
from deployments.kv.copies import BlockCopier
from engine.batch import Batch
from engine.block_hash import BlockHasher
from engine.core import EngineCore, Runner
from engine.kv_cache import KVCacheConfig
from engine.limits import SpecLimits
from engine.request import Request, RequestState, SamplingParams
from engine.runner import ModelRunner
from tests.redis_servers import redis_server, wait_until
from tests.test_batch_invariant import Subject, load
from tests.test_core import drain, tokens_of
from tests.test_scheduler import evict_all
from tests.tiny_models import make_tiny

BLOCK_SIZE, NUM_TOKENS = 4, 6
KV = KVCacheConfig(BLOCK_SIZE, dict.fromkeys(AttentionKind, 200))
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
TEXT = make_texts(160)[0]  # of 150 tokens
PROMPT = TEXT[:101]  # can be resumed after 25 blocks


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    torch.set_num_threads(1)
    return {name: load(make_tiny(name, tmp_path_factory.mktemp(name))) for name in ("26b", "e2b")}


@pytest.fixture
def address(tmp_path: Path) -> Iterator[RedisAddress]:
    with redis_server(tmp_path) as address:
        yield address


class Deployment:
    """Engines that come and go on one model, before one Redis."""

    def __init__(self, subject: Subject, address: RedisAddress, **config: Any) -> None:
        self.subject = subject
        self.registry = CollectorRegistry()
        config = {"timeout_s": address.timeout_s, **config}
        self.kv_store = KVStore(address, b"m", "m", Metrics(self.registry), StoreConfig(**config))
        self.redis = address.client()
        self.alone = EngineCore(self.runner(), KV, spec_limits=self.limits)
        self.prefill_rate: float | None = None
        self.start()

    @property
    def limits(self) -> SpecLimits:
        return SpecLimits.from_spec(self.subject.model.spec, 256)

    def runner(self, kv: KVCacheConfig = KV) -> ModelRunner:
        return ModelRunner(self.subject.model, kv, self.subject.experts)

    def connect(self, runner: ModelRunner) -> KVBlockStore:
        assert self.kv_store.flush(5)
        tensors = kv_tensors(runner)
        block_size = next(iter(tensors.values()))[0].shape[1]
        window = self.subject.model.spec.sliding_window
        return KVBlockStore(
            tensors, block_size, window, "m", lambda _: self.kv_store, self.prefill_s
        )

    def prefill_s(self, start: int, stop: int) -> float | None:
        return None if self.prefill_rate is None else (stop - start) / self.prefill_rate

    def start(self, **options: Any) -> None:
        """An engine that remembers nothing, before what Redis holds."""
        runner = self.runner()
        self.blocks = self.connect(runner)
        self.core = EngineCore(
            runner,
            KV,
            spec_limits=self.limits,
            hasher=BlockHasher(BLOCK_SIZE, "m", shared_tenants=("b", "c")),
            store=self.blocks,
            **options,
        )

    def add(self, prompt: list[int], tenant: str = "default", request_id: str = "r") -> Request:
        return self.core.add(
            request_id=request_id, prompt_ids=prompt, sampling=GREEDY, tenant=tenant
        )

    def finish(self, request: Request) -> int:
        """Run to the end: the answer is that of an engine alone; how many tokens were cached."""
        outputs = drain(self.core)[request.request_id]
        assert tokens_of(outputs) == self.cold(request.prompt_ids)
        return outputs[-1].num_cached_tokens

    def ask(self, prompt: list[int], tenant: str = "default") -> int:
        return self.finish(self.add(prompt, tenant))

    def cold(self, prompt: list[int]) -> list[int]:
        self.alone.add(request_id="alone", prompt_ids=prompt, sampling=GREEDY)
        return tokens_of(drain(self.alone)["alone"])

    def look_up(self, request: Request) -> None:
        """Until Redis has said what it has."""
        lookup = self.blocks._fetches._fetches[request].lookup
        assert lookup is not None
        wait_until(lookup.done)

    def count(self, what: str, **labels: str) -> float:
        name = f"briolette_kv_store_{what}_total"
        return self.registry.get_sample_value(name, {"model": "m", **labels}) or 0.0

    def stored(self, tenant: str = "default") -> set[bytes]:
        assert self.blocks.flush(5)
        prefix = tenant_prefix(tenant) + b"kv:"
        return {name.removeprefix(prefix) for name in self.redis.scan_iter(prefix + b"*")}

    def close(self) -> None:
        self.blocks.close()
        self.redis.close()


@pytest.fixture
def deploy(subjects: dict[str, Subject]) -> Iterator[Callable[..., Deployment]]:
    made: list[Deployment] = []

    def make(address: RedisAddress, **config: Any) -> Deployment:
        made.append(Deployment(subjects["26b"], address, **config))
        return made[-1]

    yield make
    for deployment in made:
        deployment.close()


@pytest.mark.parametrize(
    ("name", "kv_rows"), [("26b", "v"), ("26b", "raw"), ("26b", "split"), ("e2b", "v")]
)
def test_warm_from_redis_equals_cold(
    subjects: dict[str, Subject], address: RedisAddress, name: str, kv_rows: KVRows
) -> None:
    deployment = Deployment(subjects[name], address)
    tally = WarmCold(deployment.runner, deployment.connect, kv_rows).run(10)
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
    monkeypatch.setattr("deployments.kv.values.MAX_RUN_BLOCKS", 4)
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
    wait_until(lambda: not deployment.kv_store.is_up)
    deployment.ask(PROMPT)
    turn = PROMPT + deployment.cold(PROMPT)
    with redis_server(tmp_path):
        wait_until(lambda: deployment.kv_store.is_up)
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
    monkeypatch.setattr("cluster.kv_writer.RETRY_S", 0.1)
    monkeypatch.setattr("deployments.kv.values.MAX_RUN_BLOCKS", 4)
    deployment = deploy(address)
    deployment.redis.config_set("maxmemory", 1)
    deployment.ask(PROMPT)
    assert deployment.stored() == set()
    deployment.redis.config_set("maxmemory", 0)
    wait_until(lambda: deployment.kv_store.takes("default", 1))
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
    use = deployment.core.stats().prefix_use
    assert {tenant: u.num_hits for tenant, u in use.items()} == {"a": 0, "d": 0, "b": 0, "c": 1}
    assert not deployment.stored("a") & deployment.stored("d")
    deployment.start()
    assert deployment.ask(PROMPT, "e") == 0
    assert deployment.count("decisions", choice="fetch") == 0
    assert deployment.ask(PROMPT, "a") == 100


# What breaks


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
    deployment.look_up(request)
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
    deployment.look_up(request)
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
    monkeypatch.delattr("deployments.kv.copies.BlockCopier.read")
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
    monkeypatch.setattr("deployments.kv.fetches.READING_BYTES", 1)
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
    monkeypatch.setattr("deployments.kv.values.MAX_RUN_BLOCKS", 4)
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


# Fetch or recompute


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
    deployment.redis.execute_command("CLIENT", "PAUSE", 900, "ALL")
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
