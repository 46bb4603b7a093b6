"""Spans of embeddings in prompts: what is refused, their hashes, and steps that keep them whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidRequest
from cluster.kernels.native import native_kernels
from cluster.spec import AttentionKind
from engine.attention.interface import Attention, ReferenceAttention
from engine.attention.invariant_attention import InvariantAttention
from engine.attention.native_attention import NativeAttention
from engine.attention.torch_attention import FastAttention, SpanAttention
from engine.cache.block_hash import BlockHasher
from engine.cache.kv_cache import KVCacheConfig
from engine.core import EngineCore
from engine.limits import SpecLimits
from engine.request import Request, SamplingParams
from engine.scheduling.scheduler import Scheduler
from engine.spans import MediaSpan, Overlay, check_spans, uncut, uncut_blocks
from tests.support.engine.attention_cases import BLOCK_SIZE, draw, make_batch, make_kv
from tests.support.engine.fake_engine import VOCAB_SIZE, WINDOW, FakeRunner, drain
from tests.support.engine.schedulers import make_request, make_scheduler, run_step, shares

GLOBAL, SLIDING = AttentionKind.GLOBAL, AttentionKind.SLIDING
WIDTH = 3
GREEDY = SamplingParams(temperature=0, max_tokens=4)


def span(start: int, num_tokens: int, digest: bytes = b"d", *, both_ways: bool = True) -> MediaSpan:
    return MediaSpan(start, torch.zeros(num_tokens, WIDTH), digest, both_ways)


# What is refused


def make_core(num_sliding: int = 60, budget: int = 32) -> EngineCore:
    kv = KVCacheConfig(4, {GLOBAL: 60, SLIDING: num_sliding})
    limits = SpecLimits(200, WINDOW, VOCAB_SIZE, hidden_size=WIDTH)
    return EngineCore(FakeRunner(kv), kv, spec_limits=limits, max_num_batched_tokens=budget)


def add(core: EngineCore, *spans: MediaSpan, num_prompt: int = 50) -> Request:
    return core.add(request_id="r", prompt_ids=[1] * num_prompt, sampling=GREEDY, spans=spans)


@pytest.mark.parametrize(
    ("spans", "sentence"),
    [
        ([span(45, 6)], "position 45 has 6 tokens and isn't inside the prompt"),
        ([span(-1, 6)], "position -1 has 6 tokens and isn't inside"),
        ([span(20, 6), span(15, 6)], "position 20 overlaps the one at 15"),
        ([span(5, 0)], r"embeddings of the shape \(0, 3\); this model takes at least one row of 3"),
        ([MediaSpan(5, torch.zeros(6, WIDTH + 1), b"d")], r"embeddings of the shape \(6, 4\)"),
        ([MediaSpan(5, torch.zeros(WIDTH), b"d")], r"embeddings of the shape \(3,\)"),
        ([MediaSpan(5, torch.full((6, WIDTH), math.nan), b"d")], "aren't finite"),
        ([MediaSpan(5, torch.zeros(6, WIDTH, dtype=torch.int64), b"d")], "aren't finite"),
        ([MediaSpan(5, torch.zeros(6, WIDTH), b"")], "has no digest"),
        ([span(5, 33)], "33 tokens that see each other, and a step computes at most 32"),
    ],
)
def test_what_no_prompt_can_have_is_refused(spans: list[MediaSpan], sentence: str) -> None:
    core = make_core()
    with pytest.raises(InvalidRequest, match=sentence):
        add(core, *spans)
    add(core, span(44, 6), span(0, 32))
    assert drain(core)["r"][-1].error is None


def test_only_what_sees_itself_must_fit_into_a_step() -> None:
    core = make_core(num_sliding=7)  # six blocks: two of the window, and four for a step
    with pytest.raises(InvalidRequest, match="14 tokens that see each other, more than"):
        add(core, span(7, 14))
    request = add(core, span(7, 13), span(20, 30, both_ways=False))
    assert [s.start for s in request.spans] == [7, 20]
    assert drain(core)["r"][-1].error is None


# How they are hashed


def hashes(*spans: MediaSpan, prompt: Sequence[int] = range(20)) -> list[bytes]:
    request = Request("r", list(prompt), SamplingParams(), 0, max_tokens=1, spans=spans)
    BlockHasher(4, "m").extend(request)
    return request.block_hashes


def test_a_prompt_without_spans_keeps_its_hashes() -> None:
    """What older servers have stored is found by them."""
    assert [block_hash.hex() for block_hash in hashes()][:2] == [
        "3993c72071dac371efdbb64e9e7328ad2bd0e452",
        "0a982ea9feeb2c48b09d866f52e7d714695a8a40",
    ]


def test_hashes_tell_media_apart_from_the_first_block_that_they_touch() -> None:
    base = hashes(span(6, 8))
    assert base[0] == hashes()[0] and base[1:] != hashes()[1:]
    others = [
        hashes(),
        hashes(span(6, 8, b"another")),
        hashes(span(6, 8, both_ways=False)),
        hashes(span(7, 8)),
        hashes(span(6, 9)),  # the second block shows the same part of it
        hashes(span(6, 4), span(10, 4)),
    ]
    for i in range(1, 5):
        assert len({base[i], *(other[i] for other in others)}) == 7, i
    late = hashes(span(6, 8), span(16, 4))
    assert late[:4] == base[:4] and late[4] != base[4]


def test_hashes_follow_the_output() -> None:
    request = Request("r", [1] * 6, SamplingParams(), 0, max_tokens=9, spans=[span(3, 3)])
    hasher = BlockHasher(4, "m")
    hasher.extend(request)
    request.output_ids += [1] * 6
    hasher.extend(request)
    assert request.block_hashes == hashes(span(3, 3), prompt=[1] * 12)


# How steps keep them whole


def test_a_cut_moves_back_to_the_start_of_what_sees_itself() -> None:
    spans = check_spans([span(5, 3), span(8, 6), span(20, 6, both_ways=False)], 40, WIDTH)
    moved = {n: uncut(spans, n) for n in range(40) if uncut(spans, n) != n}
    assert moved == {6: 5, 7: 5, **dict.fromkeys(range(9, 14), 8)}
    assert [uncut_blocks(spans, n, 4) for n in range(7)] == [0, 1, 2, 2, 4, 5, 6]
    assert uncut_blocks([span(3, 3), span(6, 8)], 3, 4) == 0  # a block earlier is in the other one


def request_with(name: str, num_prompt: int, *spans: MediaSpan, max_tokens: int = 4) -> Request:
    request = make_request(name, num_prompt, max_tokens)
    request.spans = spans
    return request


def test_a_chunk_ends_before_a_span_that_it_would_cut() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.add(request_with("r", 50, span(10, 16), span(28, 5), span(33, 10)))
    scheduler.add(request_with("later", 4, span(0, 4)))
    assert [shares(run_step(scheduler)) for _ in range(5)] == [
        [("r", 10, False)],  # six tokens of the budget are left, but blocks are spoken for
        [("r", 16, False)],
        [("r", 7, False)],
        [("r", 16, False)],
        [("r", 1, True), ("later", 4, True)],
    ]


def test_a_span_waits_for_a_step_with_room_and_holds_up_nobody_who_runs() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.add(request_with("first", 14, max_tokens=2))
    scheduler.add(request_with("image", 20, span(1, 15)))
    scheduler.add(request_with("last", 5))
    steps = [shares(run_step(scheduler)) for _ in range(4)]
    assert steps == [
        [("first", 14, True), ("image", 1, False)],
        [("first", 1, True), ("image", 15, False)],
        [("image", 4, True), ("last", 5, True)],
        [("image", 1, True), ("last", 1, True)],
    ]
    blocked = make_scheduler(max_num_batched_tokens=16)
    blocked.add(request_with("first", 14, max_tokens=3))
    blocked.add(request_with("image", 20, span(0, 16)))
    blocked.add(request_with("last", 5))
    assert [shares(run_step(blocked)) for _ in range(4)] == [
        [("first", 14, True)],
        [("first", 1, True)],
        [("first", 1, True)],
        [("image", 16, False)],
    ]
    assert blocked.num_preemptions == 0


def test_a_span_is_admitted_when_its_step_fits_beside_the_others() -> None:
    scheduler = make_scheduler(num_sliding=8, max_num_batched_tokens=20)
    scheduler.add(request_with("runs", 12, max_tokens=6))
    scheduler.add(request_with("image", 20, span(1, 18)))
    finish(scheduler)
    assert scheduler.num_preemptions == 0


def finish(scheduler: Scheduler, request: Request | None = None) -> int:
    """Run to the end, after adding the request if there is one; its tokens that were cached."""
    if request is not None:
        scheduler.add(request)
    while scheduler.running or scheduler.waiting:
        run_step(scheduler)
        scheduler.check_integrity()
    return 0 if request is None else request.num_cached_tokens


@pytest.mark.parametrize("window", [1, 8])  # with 1, whatever is cached can be resumed
def test_nobody_resumes_inside_a_span(window: int) -> None:
    scheduler = make_scheduler(window=window, max_num_batched_tokens=32)
    cached = [finish(scheduler, request_with("r", 28, span(10, 17))) for _ in range(2)]
    assert cached == [0, 8]


def test_no_window_is_kept_inside_a_span() -> None:
    """The request ends where its last full block does."""
    scheduler = make_scheduler(max_num_batched_tokens=32)
    finish(scheduler, request_with("r", 26, span(10, 16), max_tokens=1))
    assert scheduler.kv.index.resumable_blocks() == {None: 2}


def test_where_two_prompts_part_behind_an_image_a_window_is_kept_before_it() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=32)
    cached = []
    for token in (1, 2, 3):
        request = request_with("r", 40, span(10, 16))
        request.prompt_ids[26:] = [token] * 14
        cached.append(finish(scheduler, request))
    assert cached == [0, 0, 8]


@st.composite
def prompts(draw_from: st.DrawFn, longest: int) -> tuple[int, list[MediaSpan]]:
    """How many tokens, at most 82, and their spans."""
    spans, stop = [], 0
    gaps = st.tuples(st.integers(0, 9), st.integers(1, longest), st.sampled_from([b"x", b"y"]))
    for gap, length, digest in draw_from(st.lists(gaps, max_size=3)):
        spans.append(span(stop + gap, length, digest, both_ways=draw_from(st.booleans())))
        stop += gap + length
    return stop + draw_from(st.integers(1, 10)), spans


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_step_cuts_a_span_and_everybody_is_answered(data: st.DataObject) -> None:
    budget = data.draw(st.integers(8, 30))
    scheduler = make_scheduler(
        max_num_batched_tokens=budget,
        num_global=data.draw(st.integers(24, 60)),
        window=data.draw(st.sampled_from([1, 8])),
        num_sliding=data.draw(st.integers(8, 40)),
        checkpoint_blocks=data.draw(st.sampled_from([0, 1, 3])),
    )
    longest = max(n for n in range(1, min(budget, 15) + 1) if scheduler.kv.can_ever_hold(90, n))
    for i, (num_prompt, spans) in enumerate(data.draw(st.lists(prompts(longest), max_size=6))):
        request = request_with("ab"[i % 2], num_prompt, *spans)
        request.arrived_at = i
        scheduler.add(request)
    for _ in range(300):
        if not scheduler.running and not scheduler.waiting:
            return
        check_step(scheduler, budget)
    pytest.fail("requests without an end")


def check_step(scheduler: Scheduler, budget: int) -> None:
    before = {r: r.num_computed_tokens for r in (*scheduler.running, *scheduler.waiting)}
    output = run_step(scheduler)
    scheduler.check_integrity()
    assert 0 < output.num_tokens <= budget
    for item in output.scheduled:
        start = item.request.num_computed_tokens - item.num_new_tokens
        assert start == before[item.request] or before[item.request] == 0  # behind a prefix
        for position in (start, item.request.num_computed_tokens):
            assert uncut(item.request.spans, position) == position


# Who sees whom


@pytest.mark.parametrize("window", [7, 100])
def test_every_backend_lets_a_span_see_itself(window: int) -> None:
    tables = make_batch([1, 70, 9], [30, 90, 9])
    kv = make_kv(tables, 2, 16)["separate"]
    embeddings = torch.empty(23, 1)
    batch = replace(
        tables,
        overlays=[
            Overlay(1, 12, 31, embeddings=embeddings, is_bidirectional=True),
            Overlay(1, 40, 59, embeddings=embeddings, is_bidirectional=False),
            Overlay(2, 71, 0, embeddings=embeddings[:9], is_bidirectional=True),
        ],
        block_tables={SLIDING: tables.block_tables[GLOBAL]},
    )
    query = draw(batch.num_tokens, 6, 16) * 16**-0.5
    expected = ReferenceAttention(batch, SLIDING, window, BLOCK_SIZE)(query, kv)
    causal = replace(batch, overlays=())
    before = ReferenceAttention(causal, SLIDING, window, BLOCK_SIZE)(query, kv)
    changed = (expected != before).any(1).nonzero().flatten().tolist()
    assert changed == [*range(12, 34), *range(71, 79)]  # the last one of a span saw it all before
    kernels = native_kernels()
    assert kernels is not None
    backends: list[Attention] = [
        FastAttention(batch, SLIDING, window, BLOCK_SIZE, torch.float32),
        InvariantAttention(batch, SLIDING, window, BLOCK_SIZE),
        NativeAttention(kernels.attend, batch, SLIDING, window),
    ]
    for backend in backends:
        both = SpanAttention(backend, batch, SLIDING, window, BLOCK_SIZE, torch.float32)
        assert torch.allclose(both(query, kv), expected, atol=1e-5), backend
