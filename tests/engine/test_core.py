"""EngineCore without a model: what tokens depend on, refusals, what it tells of itself."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import ContextTooLong, InvalidRequest, Overloaded
from engine.request import FinishReason, SamplingParams
from engine.scheduling.load_shedding import LoadShedding
from tests.support.engine.fake_engine import (
    CRAMPED,
    GLOBAL,
    GREEDY,
    SLIDING,
    VOCAB_SIZE,
    drain,
    greedy_answer,
    make_core,
    prompts,
    tokens_of,
)

SETTINGS: list[dict[str, Any]] = [
    {},
    {"max_num_seqs": 1},
    {"max_num_batched_tokens": 1},
    {"max_num_batched_tokens": 5, "block_size": 1},
    {"block_size": 16, "max_num_seqs": 3, "num_global": 6},
    CRAMPED,
]


@pytest.mark.parametrize("options", SETTINGS)
def test_greedy_tokens_do_not_depend_on_batch_chunks_or_preemption(options: dict[str, Any]) -> None:
    core = make_core(**options)
    asked = {f"r{i}": prompt for i, prompt in enumerate(prompts(10))}
    for name, prompt in asked.items():
        core.add(request_id=name, prompt_ids=prompt, sampling=GREEDY)
    outputs = drain(core)
    for name, prompt in asked.items():
        assert tokens_of(outputs[name]) == greedy_answer(prompt, 8)
        assert outputs[name][-1].finish_reason is FinishReason.LENGTH
        last = outputs[name][-1]
        assert (last.num_prompt_tokens, last.num_output_tokens) == (len(prompt), 8)
    if options is CRAMPED:
        assert core.stats().num_preemptions > 0


NOISY = SamplingParams(
    temperature=1.5,
    top_k=20,
    repetition_penalty=1.3,
    presence_penalty=0.5,
    frequency_penalty=0.7,
    max_tokens=12,
    logprobs=2,
)


def test_sampled_tokens_do_not_depend_on_batch_or_preemption() -> None:
    answers = []
    for options in ({}, CRAMPED, {"max_num_seqs": 1}):
        core = make_core(**options)
        for i, prompt in enumerate(prompts(8)):
            core.add(request_id=f"r{i}", prompt_ids=prompt, sampling=NOISY, seed=i)
        answers.append({name: tokens_of(outs) for name, outs in drain(core).items()})
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("num_before", [1, 5, 11])
def test_a_resumed_request_goes_on_exactly(num_before: int) -> None:
    prompt = prompts(1, seed=3)[0]
    core = make_core()
    request = core.add(request_id="r", prompt_ids=prompt, sampling=NOISY)
    whole = tokens_of(drain(core)["r"])
    assert len(whole) == 12
    resumed = make_core(**CRAMPED)
    resumed.add(
        request_id="r",
        prompt_ids=prompt,
        sampling=NOISY,
        output_ids=whole[:num_before],
        seed=request.seed,
    )
    outputs = drain(resumed)["r"]
    assert tokens_of(outputs) == whole[num_before:]
    assert outputs[-1].num_output_tokens == 12


def test_a_request_that_was_complete_ends_at_once() -> None:
    core = make_core()
    core.add(request_id="r", prompt_ids=[1], sampling=GREEDY, output_ids=[2] * 8)
    assert [output.finish_reason for output in core.step()] == [FinishReason.LENGTH]
    assert not core.has_work


def test_logprobs_come_with_their_tokens() -> None:
    core = make_core()
    core.add(request_id="r", prompt_ids=[1, 2], sampling=NOISY)
    core.add(request_id="s", prompt_ids=[1, 2], sampling=GREEDY)
    outputs = drain(core)
    assert all(out.logprobs is not None and len(out.logprobs) == 1 for out in outputs["r"])
    assert all(out.logprobs is None for out in outputs["s"])


def test_what_can_never_be_answered_is_refused_with_a_sentence() -> None:
    core = make_core(max_model_len=20)
    ask: dict[str, Any] = {"request_id": "r", "sampling": GREEDY}
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        core.add(prompt_ids=[], **ask)
    with pytest.raises(InvalidRequest, match="0 to 59"):
        core.add(prompt_ids=[1, VOCAB_SIZE], **ask)
    with pytest.raises(InvalidRequest, match="0 to 59"):
        core.add(prompt_ids=[1], output_ids=[-1], **ask)
    with pytest.raises(ContextTooLong, match="has 20 tokens; the model's context holds 20"):
        core.add(prompt_ids=[1] * 20, **ask)
    with pytest.raises(ContextTooLong, match="max_tokens can be at most 7"):
        core.add(prompt_ids=[1] * 13, **ask)
    with pytest.raises(InvalidRequest, match="need a tokenizer"):
        core.add(request_id="r", prompt_ids=[1], sampling=SamplingParams(stop=("x",)))
    core.add(prompt_ids=[1], **ask)
    with pytest.raises(InvalidRequest, match="already running"):
        core.add(prompt_ids=[1], **ask)
    drain(core)


def test_a_small_cache_bounds_the_context() -> None:
    core = make_core(num_global=5)
    with pytest.raises(ContextTooLong, match="the KV cache holds 16"):
        core.add(request_id="r", prompt_ids=[1] * 16, sampling=SamplingParams())
    core.add(request_id="r", prompt_ids=[1] * 15, sampling=SamplingParams())
    assert len(tokens_of(drain(core)["r"])) == 1


def test_a_full_queue_refuses_and_forgets_the_request() -> None:
    core = make_core(load_shedding=LoadShedding(0), max_num_seqs=1)
    core.add(request_id="a", prompt_ids=[1], sampling=GREEDY)
    with pytest.raises(Overloaded):
        core.add(request_id="b", prompt_ids=[1], sampling=GREEDY)
    assert set(drain(core)) == {"a"}
    core.add(request_id="b", prompt_ids=[1], sampling=GREEDY)
    assert set(drain(core)) == {"b"}


def test_an_idle_engine_reports_what_is_leaked(caplog: pytest.LogCaptureFixture) -> None:
    core = make_core()
    core.add(request_id="a", prompt_ids=[1], sampling=GREEDY)
    drain(core)
    assert not caplog.records
    core.kv.groups[GLOBAL].pool.allocate(2)
    core.step()
    assert "'full_attention': 2" in caplog.text


def test_stats_count_tokens_and_blocks() -> None:
    core = make_core()
    request = core.add(request_id="r", prompt_ids=[1] * 10, sampling=GREEDY)
    assert (core.stats().num_waiting, core.held_bytes(request)) == (1, 0)
    core.step()
    assert core.held_bytes(request) == 3 + 3  # blocks of a byte
    stats = core.stats()
    assert (stats.num_waiting, stats.num_running, stats.num_steps) == (0, 1, 1)
    assert (stats.num_used_blocks[GLOBAL], stats.num_free_blocks[GLOBAL]) == (3, 97)
    assert stats.num_used_blocks[SLIDING] == 3  # the window at 8 tokens, and the block begun
    drain(core)
    stats = core.stats()
    assert (stats.num_prefill_tokens, stats.num_decode_tokens) == (10, 7)
