"""EngineCore without a model: how requests end, and the text that they end with."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from functools import reduce
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.errors import DeadlineExceeded, Overloaded, Unavailable
from engine.batch import Batch
from engine.cache.kv_cache import KVCacheConfig
from engine.request import FinishReason, Request, SamplingParams
from engine.sampler import Sampler
from engine.scheduling.fair_share import FairShare
from engine.scheduling.load_shedding import LoadShedding
from engine.scheduling.token_costs import DECODE
from tests.support.engine.fake_engine import (
    CRAMPED,
    GLOBAL,
    GREEDY,
    SLIDING,
    FakeRunner,
    drain,
    fail,
    greedy_answer,
    letters,
    make_core,
    prompts,
    runner_of,
    spell,
    tokens_of,
)


def test_exhausted_blocks_preempt_and_everybody_ends() -> None:
    core = make_core(num_global=9, num_sliding=9, max_model_len=32)
    for i in range(6):
        core.add(
            request_id=f"r{i}",
            prompt_ids=[i] * 5,
            sampling=SamplingParams(temperature=0, max_tokens=27),
        )
    outputs = drain(core)
    assert core.stats().num_preemptions > 0
    for i in range(6):
        assert tokens_of(outputs[f"r{i}"]) == greedy_answer([i] * 5, 27)


def test_deadlines_end_running_and_waiting_requests() -> None:
    core = make_core(max_num_seqs=2)
    soon = time.monotonic() + 0.05
    core.add(request_id="runs", prompt_ids=[1], sampling=GREEDY, deadline_at=soon)
    core.add(request_id="stays", prompt_ids=[2], sampling=GREEDY, deadline_at=soon + 60)
    core.add(request_id="waits", prompt_ids=[3], sampling=GREEDY, deadline_at=soon)
    assert {output.request_id for output in core.step()} == {"runs", "stays"}
    time.sleep(0.06)
    outputs = drain(core)
    assert outputs["runs"][-1].finish_reason is FinishReason.DEADLINE
    assert outputs["runs"][-1].num_output_tokens == 1
    assert outputs["waits"][-1].finish_reason is FinishReason.DEADLINE
    assert outputs["stays"][-1].finish_reason is FinishReason.LENGTH


def test_a_deadline_that_is_past_is_no_overload() -> None:
    """Which a client would try again."""
    core = make_core()
    past = time.monotonic() - 0.5
    with pytest.raises(DeadlineExceeded, match="expired before the request was accepted"):
        core.add(request_id="late", prompt_ids=[1], sampling=GREEDY, deadline_at=past)
    assert not core.has_work


def test_abort_in_the_middle_of_a_prompt_frees_its_blocks_at_once() -> None:
    core = make_core(max_num_batched_tokens=10)
    core.add(request_id="gone", prompt_ids=[1] * 40, sampling=GREEDY)
    assert core.step() == []
    assert core.stats().num_used_blocks[GLOBAL] == 3
    core.abort("gone")
    assert set(core.stats().num_used_blocks.values()) == {0}
    core.abort("gone")
    core.abort("never seen")
    outputs = drain(core)
    assert [output.finish_reason for output in outputs["gone"]] == [FinishReason.ABORT]


def test_abort_in_the_queue() -> None:
    core = make_core()
    core.add(request_id="r", prompt_ids=[1], sampling=GREEDY)
    core.abort("r")
    assert drain(core)["r"][0].finish_reason is FinishReason.ABORT


@pytest.mark.parametrize("broken", ["scheduler.kv.find_prefix", "scheduler.store.fetch", "_resume"])
def test_a_failed_add_leaves_nothing(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    released: list[Request] = []
    monkeypatch.setattr(core.scheduler.store, "release", released.append)
    *path, name = broken.split(".")
    monkeypatch.setattr(reduce(getattr, path, core), name, fail)
    with pytest.raises(RuntimeError, match="unforeseen"):
        core.add(request_id="r", prompt_ids=[5, 6], sampling=GREEDY)
    assert [request.request_id for request in released] == ["r"]
    monkeypatch.undo()
    core.check_integrity()
    core.add(request_id="r", prompt_ids=[5, 6], sampling=GREEDY)
    assert tokens_of(drain(core)["r"]) == greedy_answer([5, 6], 8)


def test_an_error_fails_the_requests_of_its_step_and_no_others() -> None:
    core = make_core(max_num_seqs=2)
    for name in ("a", "b", "c"):
        core.add(request_id=name, prompt_ids=[5, 6], sampling=GREEDY)
    core.step()
    runner_of(core).fails_with = RuntimeError("no such kernel")
    failed = core.step()
    assert {output.request_id for output in failed} == {"a", "b"}
    for output in failed:
        assert output.finish_reason is FinishReason.ERROR and output.error_status == "INTERNAL"
        assert output.error == "RuntimeError while computing: no such kernel"
    runner_of(core).fails_with = None
    core.check_integrity()
    assert tokens_of(drain(core)["c"]) == greedy_answer([5, 6], 8)


@pytest.mark.parametrize("broken", ["runner.execute", "sampler.sample", "_append"])
def test_a_step_that_fails_is_charged_to_those_who_were_in_it(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(policy=FairShare(), max_num_batched_tokens=8)
    core.add(request_id="in", prompt_ids=[5, 6, 7], sampling=GREEDY, tenant="breaks", weight=2.0)
    core.step()
    core.add(request_id="chunk", prompt_ids=[5] * 20, sampling=GREEDY, tenant="reads")
    core.add(request_id="out", prompt_ids=[5, 6, 7], sampling=GREEDY, tenant="waits")
    *path, name = broken.split(".")
    monkeypatch.setattr(reduce(getattr, path, core), name, fail)
    assert {output.request_id for output in core.step()} == {"in", "chunk"}
    shares = core.stats().fair_share
    assert {tenant: share.service for tenant, share in shares.items()} == {
        "breaks": 3 + DECODE,
        "reads": 7,
        "waits": 0,
    }
    assert shares["breaks"].counter == (3 + DECODE) / 2
    monkeypatch.undo()
    core.check_integrity()
    drain(core)


@pytest.mark.parametrize("seed", range(8))
def test_every_accepted_request_has_one_end_in_any_chaos(seed: int) -> None:
    rng = random.Random(seed)
    core = make_core(
        load_shedding=LoadShedding(6), tokenizer=letters(), eos_token_ids=(7,), **CRAMPED
    )
    accepted: set[str] = set()
    ends: list[str] = []
    for step in range(400):
        if step < 120 and rng.random() < 0.4:
            name = f"r{step}"
            sampling = SamplingParams(max_tokens=rng.randint(1, 20), stop=("AB", "Q"))
            late = rng.choice([None, None, time.monotonic() + rng.random() * 0.02])
            prompt = prompts(1, seed=step)[0]
            try:
                core.add(request_id=name, prompt_ids=prompt, sampling=sampling, deadline_at=late)
                accepted.add(name)
            except (Overloaded, DeadlineExceeded):
                pass
        if accepted and rng.random() < 0.1:
            core.abort(rng.choice(sorted(accepted)))
        broken = rng.random() < 0.05
        runner_of(core).fails_with = RuntimeError("chaos") if broken else None
        ends += [out.request_id for out in core.step() if out.finish_reason is not None]
        core.check_integrity()
    runner_of(core).fails_with = None
    ends += drain(core)
    assert sorted(ends) == sorted(accepted)


def test_an_error_of_ours_keeps_its_sentence_and_status() -> None:
    core = make_core()
    core.add(request_id="r", prompt_ids=[1], sampling=GREEDY)
    runner_of(core).fails_with = Unavailable("No expert host answers.")
    (output,) = core.step()
    assert (output.error, output.error_status) == ("No expert host answers.", "UNAVAILABLE")
    drain(core)


def test_an_error_of_the_sampler_is_an_end_too() -> None:
    class BrokenSampler(Sampler):
        def sample(self, logits: Tensor, requests: Sequence[Request]) -> Any:
            raise ValueError("not a number")

    core = make_core()
    core.sampler = BrokenSampler()
    core.add(request_id="r", prompt_ids=[1], sampling=GREEDY)
    assert drain(core)["r"][-1].finish_reason is FinishReason.ERROR


def test_logits_that_are_no_numbers_end_their_own_request_only() -> None:
    class HalfBroken(FakeRunner):
        def execute(self, batch: Batch) -> Tensor:
            logits = super().execute(batch)
            logits[0] = torch.nan
            return logits

    core = make_core()
    core.runner = HalfBroken(KVCacheConfig(4, {GLOBAL: 101, SLIDING: 101}))
    core.add(request_id="broken", prompt_ids=[1], sampling=GREEDY)
    core.add(request_id="whole", prompt_ids=[2], sampling=GREEDY)
    first = core.step()
    assert [(out.request_id, out.finish_reason) for out in first] == [
        ("broken", FinishReason.ERROR),
        ("whole", None),
    ]
    assert first[0].error is not None and "not finite" in first[0].error
    core.abort("whole")
    drain(core)


def test_the_end_of_sequence_is_kept_out_of_the_text_and_may_be_ignored() -> None:
    answer = greedy_answer([9, 9], 8)
    core = make_core(eos_token_ids=(answer[3],), tokenizer=letters())
    core.add(request_id="stops", prompt_ids=[9, 9], sampling=GREEDY)
    ignoring = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    core.add(request_id="goes on", prompt_ids=[9, 9], sampling=ignoring)
    outputs = drain(core)
    end = answer.index(answer[3])
    assert tokens_of(outputs["stops"]) == answer[: end + 1]
    assert outputs["stops"][-1].finish_reason is FinishReason.STOP
    assert outputs["stops"][-1].matched_stop is None
    assert "".join(output.text for output in outputs["stops"]) == spell(answer[:end])
    assert tokens_of(outputs["goes on"]) == answer


def test_stop_token_ids_end_a_request_and_are_named() -> None:
    answer = greedy_answer([9, 9], 8)
    sampling = SamplingParams(temperature=0, max_tokens=8, stop_token_ids=(answer[2],))
    core = make_core()
    core.add(request_id="r", prompt_ids=[9, 9], sampling=sampling)
    last = drain(core)["r"][-1]
    assert (last.finish_reason, last.matched_stop) == (FinishReason.STOP, answer[2])


def test_the_context_is_the_last_end() -> None:
    core = make_core(max_model_len=16)
    core.add(request_id="r", prompt_ids=[3] * 10, sampling=SamplingParams(temperature=0))
    outputs = drain(core)["r"]
    assert len(tokens_of(outputs)) == 6
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_text_comes_in_deltas() -> None:
    core = make_core(tokenizer=letters())
    core.add(request_id="r", prompt_ids=[4], sampling=GREEDY)
    texts = [output.text for output in drain(core)["r"]]
    assert texts == list(spell(greedy_answer([4], 8)))


@pytest.mark.parametrize("num_before", [0, 2, 4])
def test_a_stop_string_ends_the_text_before_it_resumed_or_not(num_before: int) -> None:
    answer = greedy_answer([4], 8)
    text = spell(answer)
    stop = text[3:6]
    sampling = SamplingParams(temperature=0, max_tokens=8, stop=("nowhere", stop))
    core = make_core(tokenizer=letters())
    core.add(request_id="r", prompt_ids=[4], sampling=sampling, output_ids=answer[:num_before])
    outputs = drain(core)["r"]
    # What was held back before the break, the beginning of the stop string, isn't text either.
    assert "".join(output.text for output in outputs) == text[min(num_before, 3) : text.index(stop)]
    assert outputs[-1].matched_stop == stop
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_text_held_back_comes_with_the_end() -> None:
    text = spell(greedy_answer([4], 8))
    sampling = SamplingParams(temperature=0, max_tokens=8, stop=(text[6:] + "zz",))
    core = make_core(tokenizer=letters())
    core.add(request_id="r", prompt_ids=[4], sampling=sampling)
    assert "".join(output.text for output in drain(core)["r"]) == text
