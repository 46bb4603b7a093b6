"""Prefix caching: who resumes where, what is kept, what goes first; no bit depends on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.config import Config
from cluster.spec import AttentionKind, KVLayout
from deployments.loading import ModelSource, make_hasher
from deployments.verify.random_cases import ConnectStore, RandomCases
from engine.batch import Batch
from engine.cache.block_hash import BlockHasher, block_hash
from engine.cache.eviction import EvictionQueue, eviction_priority
from engine.cache.kv_cache import KVCacheConfig
from engine.core import EngineCore
from engine.request import FinishReason, Request, RequestState, SamplingParams
from engine.runner import ModelRunner
from tests.support.engine.fake_engine import (
    GREEDY,
    FakeRunner,
    drain,
    greedy_answer,
    make_core,
    runner_of,
    tokens_of,
)
from tests.support.engine.invariant_subjects import Subject, load
from tests.support.engine.memory_store import MemoryStore, TensorBlocks
from tests.support.engine.schedulers import (
    evict_all,
    make_request,
    make_scheduler,
    run_step,
    shares,
)
from tests.support.engine.tiny_models import make_tiny

GLOBAL, SLIDING = AttentionKind.GLOBAL, AttentionKind.SLIDING
DOCUMENT = [(7 * i * i + 3 * i) % 60 for i in range(40)]  # ten blocks; a window needs two


def ask(core: EngineCore, prompt: list[int], tenant: str = "default") -> tuple[list[int], int]:
    """The answer, checked, and how many tokens were found cached."""
    core.add(request_id="r", prompt_ids=prompt, sampling=GREEDY, tenant=tenant)
    outputs = drain(core)["r"]
    answer = tokens_of(outputs)
    assert answer == greedy_answer(prompt, 8)
    return answer, outputs[-1].num_cached_tokens


# Who resumes where


def test_the_same_prompt_again_resumes_at_its_last_block_but_computes_a_token() -> None:
    core = make_core()
    assert [ask(core, DOCUMENT[:18])[1] for _ in range(2)] == [0, 16]
    assert [ask(core, DOCUMENT[:32])[1] for _ in range(2)] == [16, 28]
    assert core.stats().num_prefill_tokens == 18 + 2 + 16 + 4


def test_the_next_turn_resumes_at_the_end_of_the_last() -> None:
    core = make_core()
    conversation = DOCUMENT[:18]
    cached = []
    for _ in range(3):
        answer, num_cached = ask(core, conversation)
        cached.append(num_cached)
        conversation += [*answer, 5, 6, 7]
    # The last token of an answer was never computed: 25 are after the first turn, 36 after two.
    assert cached == [0, 24, 36]


def test_a_shared_beginning_is_kept_from_the_second_prompt_on() -> None:
    """Where two prompts part there is no window yet; the second one leaves it behind."""
    core = make_core()
    prompts = [DOCUMENT[:20] + [n] * 9 for n in (1, 2, 3, 4)]
    assert [ask(core, prompt)[1] for prompt in prompts] == [0, 0, 20, 20]


def test_a_shared_document_hits_at_once_with_checkpoints_inside_prompts() -> None:
    core = make_core(checkpoint_blocks=3, max_num_batched_tokens=7)
    questions = [DOCUMENT + [n] * 12 for n in (1, 2, 3)]
    assert [ask(core, question)[1] for question in questions] == [0, 36, 40]


def test_prompts_that_run_together_share_what_is_computed_already() -> None:
    core = make_core(max_num_batched_tokens=45)
    prompt = [*DOCUMENT, 9]
    requests = []
    for name in ("first", "second"):
        requests.append(core.add(request_id=name, prompt_ids=prompt, sampling=GREEDY))
        core.step()
    assert core.stats().num_used_blocks[GLOBAL] == 12  # ten in common and one of each
    drain(core)
    assert [request.num_cached_tokens for request in requests] == [0, 40]
    assert requests[1].output_ids == greedy_answer(prompt, 8)


def test_the_same_block_computed_twice_is_held_once() -> None:
    core = make_core()
    requests = [
        core.add(request_id=name, prompt_ids=DOCUMENT, sampling=GREEDY) for name in ("a", "b")
    ]
    core.step()
    assert core.stats().num_used_blocks == {GLOBAL: 10, SLIDING: 2}
    drain(core)
    for request in requests:
        assert request.output_ids == greedy_answer(DOCUMENT, 8)


@pytest.mark.parametrize(("kinds", "window"), [((GLOBAL,), 8), ((SLIDING,), 8), ((SLIDING,), 1)])
def test_models_with_one_kind_of_layers(kinds: tuple[AttentionKind, ...], window: int) -> None:
    scheduler = make_scheduler(kinds=kinds, window=window)
    for num_new in (11, 3):
        scheduler.add(make_request("r", 11, 6))
        assert shares(run_step(scheduler)) == [("r", num_new, True)]
        while scheduler.running:
            run_step(scheduler)
            scheduler.check_integrity()


def test_without_global_windows_every_block_can_be_resumed() -> None:
    scheduler = make_scheduler(kinds=(GLOBAL,))
    for num_prompt, num_new in ((15, 15), (11, 3), (6, 2)):
        request = make_request("r", num_prompt, 1)
        scheduler.add(request)
        assert shares(run_step(scheduler)) == [("r", num_new, True)]


def test_without_a_hasher_nothing_is_cached() -> None:
    core = make_core(hasher=None)
    assert [ask(core, DOCUMENT)[1] for _ in range(2)] == [0, 0]
    assert set(core.stats().num_cached_blocks.values()) == {0}


# Tenants


def test_tenants_share_nothing_unless_both_opted_in() -> None:
    core = make_core()
    tenants = ("zoe", "yan", "zoe", "ann", "bob", "yan")  # ann and bob share
    assert [ask(core, DOCUMENT, tenant)[1] for tenant in tenants] == [0, 0, 36, 0, 36, 36]
    use = core.stats().prefix_stats
    counts = {t: (u.num_queries, u.num_hits, u.num_cached_tokens) for t, u in use.items()}
    assert counts == {"zoe": (2, 1, 36), "yan": (2, 1, 36), "ann": (1, 0, 0), "bob": (1, 1, 36)}
    # What doesn't hit is computed and held as if the other tenant weren't there.
    assert core.stats().num_prefill_tokens == 3 * 40 + 3 * 4
    assert core.stats().num_cached_blocks[GLOBAL] == 3 * 11


def test_hashes_tell_models_tenants_media_and_all_that_came_before_apart() -> None:
    def hashes(prompt: list[int], tenant: str = "zoe", model: str = "m", size: int = 4) -> bytes:
        request = Request("r", prompt, SamplingParams(), 0, max_tokens=1, tenant=tenant)
        BlockHasher(size, model, ("ann", "bob")).extend(request)
        assert len(request.block_hashes) == len(prompt) // size
        return request.block_hashes[-1]

    base = list(range(12))
    assert hashes(base) == hashes([*base, 99])
    assert hashes(base, "ann") == hashes(base, "bob")
    others = [
        hashes([1, *base[1:]]),
        hashes([*base[:-1], 0]),
        hashes(base[4:]),
        hashes(base, "shared"),
        hashes(base, "ann"),
        hashes(base, model="n"),
        hashes(base, size=6),
    ]
    assert len({hashes(base), *others}) == 8
    assert block_hash(b"p", b"t") != block_hash(b"p", b"t", b"an image")


def test_a_hash_is_computed_once_and_follows_the_output() -> None:
    request = Request("r", [1] * 9, SamplingParams(), 0, max_tokens=9)
    hasher = BlockHasher(4, "m")
    hasher.extend(request)
    before = list(request.block_hashes)
    request.output_ids += [2, 3, 4]
    hasher.extend(request)
    whole = Request("w", [1] * 9 + [2, 3, 4], SamplingParams(), 0, max_tokens=9)
    hasher.extend(whole)
    assert request.block_hashes[:2] == before and all(
        ours is earlier for ours, earlier in zip(request.block_hashes, before, strict=False)
    )
    assert request.block_hashes == whole.block_hashes and len(before) == 2


def test_the_configuration_says_what_changes_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def last_hash(**overrides: Any) -> bytes | None:
        config = Config.load(None, overrides)
        hasher = make_hasher(config, ModelSource.open(config))
        if hasher is None:
            return None
        request = Request("r", [1] * 16, SamplingParams(), 0, max_tokens=1)
        hasher.extend(request)
        return request.block_hashes[-1]

    assert last_hash() == last_hash(engine={"max_num_seqs": 3})
    others: list[dict[str, Any]] = [
        {"dtype": "bfloat16"},
        {"batch_invariant": True},
        {"experts": {"num_groups": 8}},
        {"engine": {"kv_layout": "projection"}},
        {"engine": {"kv_layout": "separate"}},
    ]
    assert len({last_hash(), *(last_hash(**other) for other in others)}) == 6
    assert last_hash(engine={"prefix_caching": False}) is None
    with_these_kernels = last_hash()
    monkeypatch.setattr(ModelSource, "kernels", "others")
    assert last_hash() != with_these_kernels


# What is kept, and what goes first


def test_windows_are_written_once_and_dropped_with_their_last_checkpoint() -> None:
    core = make_core()
    ask(core, DOCUMENT[:18])
    # Checkpoints after 4 blocks (prompt) and 6 (turn): two blocks of window each.
    assert core.stats().num_cached_blocks == {GLOBAL: 6, SLIDING: 4}
    core = make_core(checkpoint_blocks=1)
    ask(core, DOCUMENT[:18])
    assert core.stats().num_cached_blocks == {GLOBAL: 6, SLIDING: 6}
    index, pool = core.kv.index, core.kv.groups[SLIDING].pool
    index.make_room(SLIDING, pool.num_unused + 1)
    core.check_integrity()
    # Every second checkpoint has a window that others cover: they went first, and freed nothing.
    assert pool.num_cached == 4
    again = Request("again", DOCUMENT[:18], GREEDY, 0, max_tokens=1)
    assert core.kv.find_prefix(again).num_blocks == 4
    index.make_room(SLIDING, pool.num_free)
    core.check_integrity()
    # Without a window the global blocks are worthless, and gone too.
    assert core.stats().num_cached_blocks == {GLOBAL: 0, SLIDING: 0}
    assert core.stats().num_evicted_blocks == {GLOBAL: 6, SLIDING: 6}


def test_a_chain_is_evicted_from_its_end_and_takes_its_windows_along() -> None:
    core = make_core()
    answer, _ = ask(core, DOCUMENT[:18])
    pool = core.kv.groups[GLOBAL].pool
    core.kv.index.make_room(GLOBAL, pool.num_unused + 1)
    core.check_integrity()
    assert core.stats().num_cached_blocks == {GLOBAL: 4, SLIDING: 2}
    assert ask(core, DOCUMENT[:18] + answer + [1])[1] == 16


def test_work_saved_per_byte_outweighs_recency_for_a_while() -> None:
    core = make_core(block_size=4, num_global=60)
    ask(core, DOCUMENT)
    for n in range(1, 40):
        ask(core, [n] * 6)  # short, later, and with a window of its own
        if n in (8, 39):
            probe = Request("probe", DOCUMENT, GREEDY, 0, max_tokens=1)
            assert core.kv.find_prefix(probe).num_blocks == (9 if n == 8 else 0)
    assert core.stats().num_evicted_blocks[GLOBAL] > 50


def test_the_eviction_priority() -> None:
    worth = eviction_priority(0, num_blocks_saved=10, num_bytes=100)
    assert worth > eviction_priority(0, 9, 100) and worth > eviction_priority(0, 10, 101)
    assert eviction_priority(worth, 1, 1000) > worth  # as old as the clock is
    assert eviction_priority(worth, 1, 0) == worth  # nothing would be lost


def test_the_eviction_queue_follows_priorities_that_rose_and_forgets_the_dead() -> None:
    priorities = {name: float(i) for i, name in enumerate("abcdef")}
    alive = set(priorities)
    queue = EvictionQueue[str](priorities.__getitem__, alive.__contains__)
    for name in (*priorities, *priorities):
        queue.add(name)
    priorities["a"] = 3.5
    alive.discard("c")
    assert [queue.pop()[1] for _ in range(5)] == ["b", "d", "a", "e", "f"]
    for i in range(10_000):
        priorities[f"n{i}"] = 0.0
        alive.add(f"n{i}")
        queue.add(f"n{i}")
        alive.discard(f"n{i - 10}")
    assert sum(f"n{i}" in queue for i in range(10_000)) < 200


# Ends that aren't good ones


def test_what_was_computed_before_an_abort_is_kept() -> None:
    core = make_core(max_num_batched_tokens=10)
    core.add(request_id="gone", prompt_ids=DOCUMENT, sampling=GREEDY)
    core.step()
    core.step()
    core.abort("gone")
    assert ask(core, DOCUMENT)[1] == 20


def test_blocks_of_a_failed_step_are_not_found() -> None:
    class Garbage(FakeRunner):
        def execute(self, batch: Batch) -> Tensor:
            logits = super().execute(batch) if self.fails_with is None else None
            for kind, slots in self.slots.items() if logits is None else ():
                slots[batch.slot_mapping[kind]] = -7
            if logits is None:
                raise RuntimeError("in the middle of a step")
            return logits

    core = make_core(max_num_batched_tokens=10)
    core.runner = runner = Garbage(KVCacheConfig(4, {GLOBAL: 101, SLIDING: 101}))
    core.add(request_id="fails", prompt_ids=DOCUMENT, sampling=GREEDY)
    core.step()
    runner.fails_with = RuntimeError()
    assert core.step()[0].finish_reason is FinishReason.ERROR
    runner.fails_with = None
    assert [ask(core, DOCUMENT)[1] for _ in range(2)] == [8, 36]


def test_nothing_is_kept_of_a_request_whose_logits_are_no_numbers() -> None:
    class Broken(FakeRunner):
        is_broken = False

        def execute(self, batch: Batch) -> Tensor:
            logits = super().execute(batch)
            return logits * torch.nan if self.is_broken else logits

    core = make_core(checkpoint_blocks=1, max_num_batched_tokens=10)
    core.runner = runner = Broken(KVCacheConfig(4, {GLOBAL: 101, SLIDING: 101}))
    ask(core, DOCUMENT)
    runner.is_broken = True
    core.add(request_id="r", prompt_ids=DOCUMENT, sampling=GREEDY)
    assert drain(core)["r"][-1].finish_reason is FinishReason.ERROR
    runner.is_broken = False
    assert ask(core, DOCUMENT)[1] == 0


# A slower tier


class SlotBlocks:
    """The blocks of a FakeRunner."""

    def __init__(self, runner: FakeRunner) -> None:
        self._runner = runner

    def read(self, kind: AttentionKind, block_id: int) -> Tensor:
        return self._block(kind, block_id).clone()

    def write(self, kind: AttentionKind, block_id: int, value: Tensor) -> None:
        self._block(kind, block_id).copy_(value)

    def _block(self, kind: AttentionKind, block_id: int) -> Tensor:
        return self._runner.slots[kind].view(-1, self._runner.block_size, 2)[block_id]


def core_with(store: MemoryStore, **options: Any) -> EngineCore:
    core = make_core(store=store, **options)
    store.blocks = SlotBlocks(runner_of(core))
    return core


@pytest.mark.parametrize("polls", [0, 3])
def test_cold_warm_from_memory_and_warm_from_the_store(polls: int) -> None:
    store = MemoryStore(polls)
    core = core_with(store)
    assert [ask(core, DOCUMENT)[1] for _ in range(2)] == [0, 36]
    assert store.num_loaded == 0
    evict_all(core.scheduler)
    assert ask(core, DOCUMENT)[1] == 36
    assert store.num_loaded == 9 + 2
    restarted = core_with(store)
    assert ask(restarted, DOCUMENT + greedy_answer(DOCUMENT, 8) + [1])[1] == 44
    assert store.num_loaded == 11 + 11 + 2
    # What came from the store is cached as if it had been computed.
    assert ask(restarted, DOCUMENT + greedy_answer(DOCUMENT, 8) + [2])[1] == 48
    assert store.num_loaded == 24 and not store.on_their_way


def test_the_store_adds_to_what_is_cached() -> None:
    store = MemoryStore()
    core = core_with(store)
    ask(core, DOCUMENT)
    evict_all(core.scheduler)
    ask(core, DOCUMENT[:18])  # nothing comes from the store, its windows are elsewhere
    num_loaded = store.num_loaded
    assert ask(core, DOCUMENT)[1] == 36
    assert store.num_loaded == num_loaded + 5 + 2  # four global blocks are cached


def test_a_store_that_never_answers_holds_up_nobody_else_and_can_be_cancelled() -> None:
    store = MemoryStore()
    core = core_with(store)
    ask(core, DOCUMENT)
    evict_all(core.scheduler)
    store.polls = None
    waiting = core.add(request_id="waits", prompt_ids=DOCUMENT, sampling=GREEDY)
    core.add(request_id="other", prompt_ids=[1, 2, 3], sampling=GREEDY)
    for _ in range(20):
        core.step()
    assert waiting.state is RequestState.WAITING_FOR_BLOCKS
    assert core.waits_for_blocks and core.stats().num_running == 0
    core.abort("waits")
    assert not core.waits_for_blocks  # the end is still to be returned
    assert not store.on_their_way
    assert drain(core)["waits"][-1].finish_reason is FinishReason.ABORT


def test_a_store_that_fails_or_lost_everything_costs_nothing_but_warmth() -> None:
    store = MemoryStore(1)
    ask(core_with(store), DOCUMENT)
    store.fails = True
    assert ask(core_with(store), DOCUMENT)[1] == 0
    store.fails = False
    core = core_with(store)
    core.add(request_id="r", prompt_ids=DOCUMENT, sampling=GREEDY)
    store.values.clear()  # after it has promised
    outputs = drain(core)["r"]
    assert tokens_of(outputs) == greedy_answer(DOCUMENT, 8)
    assert outputs[-1].num_cached_tokens == 0 and not store.on_their_way


def test_a_request_that_gave_way_asks_the_store_again() -> None:
    """Two grow until one gives way; what it had computed is evicted and comes back."""
    store = MemoryStore()
    core = core_with(store, num_global=17)
    prompts = {"first": DOCUMENT[:24], "second": DOCUMENT[8:32]}
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    for request_id, prompt in prompts.items():
        core.add(request_id=request_id, prompt_ids=prompt, sampling=sampling)
    outputs = drain(core)
    assert core.stats().num_preemptions > 0 and store.num_loaded > 0
    for request_id, prompt in prompts.items():
        assert tokens_of(outputs[request_id]) == greedy_answer(prompt, 20)


# Equal bits

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "26b": ("26b", {}),
    "26b-wide": (
        "26b",
        {"hidden_size": 192, "head_dim": 64, "moe_intermediate_size": 96, "sliding_window": 70},
    ),
    "e2b": ("e2b", {}),
}


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    return {
        name: load(make_tiny(member, tmp_path_factory.mktemp(name), **overrides))
        for name, (member, overrides) in MODELS.items()
    }


@pytest.mark.parametrize(
    ("name", "kv_layout"),
    [
        ("26b", "values"),
        ("26b", "projection"),
        ("26b-wide", "values"),
        ("26b-wide", "projection"),
        ("26b-wide", "separate"),
        ("e2b", "separate"),
    ],
)
@pytest.mark.parametrize("with_store", [False, True])
def test_warm_equals_cold(
    subjects: dict[str, Subject], name: str, kv_layout: KVLayout, with_store: bool
) -> None:
    subject = subjects[name]
    torch.set_num_threads(1)
    cases = RandomCases(
        lambda kv: ModelRunner(subject.model, kv, subject.experts),
        connect_to(MemoryStore(1), subject) if with_store else None,
        kv_layout,
    )
    tally = cases.run(10)
    assert tally.num_rows > 100 and tally.num_unequal == 0, tally
    assert min(tally.num_hits, tally.num_evicted, tally.num_restarts) > 3, tally


def connect_to(store: MemoryStore, subject: Subject) -> ConnectStore:
    kinds = [layer.kind for layer in subject.model.spec.layers]

    def connect(runner: ModelRunner) -> MemoryStore:
        store.blocks = TensorBlocks(runner.kv_tensors, kinds)
        return store

    return connect
