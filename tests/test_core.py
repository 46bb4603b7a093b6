"""EngineCore with a runner that checks every key it reads and computes no model."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from functools import reduce
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from cluster.errors import ContextTooLong, InvalidRequest, Overloaded, Unavailable
from cluster.spec import AttentionKind
from engine.batch import Batch
from engine.block_hash import BlockHasher
from engine.core import EngineCore
from engine.fair_share import FairShare
from engine.kv_cache import KVCacheConfig
from engine.limits import SpecLimits
from engine.load_shedding import LoadShedding
from engine.outputs import RequestOutput
from engine.request import FinishReason, Request, SamplingParams
from engine.sampler import Sampler
from engine.token_costs import DECODE
from engine.tokenizer import Tokenizer

GLOBAL, SLIDING = AttentionKind.GLOBAL, AttentionKind.SLIDING
VOCAB_SIZE = 60
WINDOW = 6
SHARING = ("ann", "bob")  # tenants
GREEDY = SamplingParams(temperature=0, max_tokens=8)


def logits_of(all_tokens: Sequence[int], window_tokens: Sequence[int]) -> Tensor:
    """A model: any function of what global attention and the window see will do."""
    digest = 17
    for token in (*all_tokens, -1, *window_tokens):
        digest = (digest * 31 + token + 2) % 1_000_003
    return torch.tensor([(digest * (v + 3) * 7919 % 10_007) / 1000 for v in range(VOCAB_SIZE)])


class FakeRunner:
    """Keeps (token, position) per slot and reads them back through the block tables."""

    def __init__(self, kv: KVCacheConfig) -> None:
        self.block_size = kv.block_size
        self.slots = {
            kind: torch.full((num_blocks * kv.block_size, 2), -1)
            for kind, num_blocks in kv.num_blocks.items()
        }
        self.batches: list[Batch] = []
        self.fails_with: Exception | None = None

    def execute(self, batch: Batch) -> Tensor:
        self.batches.append(batch)
        if self.fails_with is not None:
            raise self.fails_with
        written = torch.stack([batch.input_ids, batch.positions], dim=1)
        for kind, slots in self.slots.items():
            slots[batch.slot_mapping[kind]] = written
        starts = [0]
        for query_len in batch.query_lens:
            starts.append(starts[-1] + query_len)
        wanted = set(batch.logits_indices.tolist())
        logits = []
        for row, seq_len in enumerate(batch.seq_lens):
            for index in range(starts[row], starts[row + 1]):
                position = int(batch.positions[index])
                assert position == seq_len - (starts[row + 1] - index)
                read = [
                    self.read(batch, GLOBAL, row, 0, position),
                    self.read(batch, SLIDING, row, max(0, position - WINDOW + 1), position),
                ]
                if index in wanted:
                    logits.append(logits_of(*read))
        return torch.stack(logits) if logits else torch.empty(0, VOCAB_SIZE)

    def read(self, batch: Batch, kind: AttentionKind, row: int, first: int, last: int) -> list[int]:
        positions = torch.arange(first, last + 1)
        blocks = batch.block_tables[kind][row][positions // self.block_size]
        read = self.slots[kind][blocks * self.block_size + positions % self.block_size]
        assert (blocks > 0).all() and torch.equal(read[:, 1], positions), "wrong keys are read"
        return cast(list[int], read[:, 0].tolist())


def greedy_answer(prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(logits_of(tokens, tokens[-WINDOW:]).argmax()))
    return tokens[len(prompt) :]


def make_core(
    *,
    num_global: int = 101,
    num_sliding: int = 101,
    block_size: int = 4,
    max_model_len: int = 64,
    eos_token_ids: tuple[int, ...] = (),
    **options: Any,
) -> EngineCore:
    kv = KVCacheConfig(block_size, {GLOBAL: num_global, SLIDING: num_sliding})
    limits = SpecLimits(max_model_len, WINDOW, VOCAB_SIZE, eos_token_ids)
    options = {"hasher": BlockHasher(block_size, "model", SHARING), **options}
    return EngineCore(FakeRunner(kv), kv, spec_limits=limits, sampler=Sampler(), **options)


def runner_of(core: EngineCore) -> FakeRunner:
    assert isinstance(core.runner, FakeRunner)
    return core.runner


def drain(core: EngineCore, max_steps: int = 2000) -> dict[str, list[RequestOutput]]:
    """Step until idle; all outputs by request. Whatever happened, nothing may be leaked."""
    outputs: dict[str, list[RequestOutput]] = {}
    for _ in range(max_steps):
        if not core.has_work:
            break
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
        core.check_integrity()
        if core.waits_for_blocks:
            time.sleep(0.001)
    assert not core.has_work, "requests without an end"
    assert set(core.stats().num_used_blocks.values()) == {0}
    for of_request in outputs.values():
        ends = [output.finish_reason for output in of_request]
        assert ends[-1] is not None and ends[:-1] == [None] * (len(ends) - 1)
    return outputs


def fail(*_: object) -> None:
    raise RuntimeError("unforeseen")


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


def prompts(count: int, seed: int = 0, max_len: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, max_len))] for _ in range(count)
    ]


CRAMPED: dict[str, Any] = {"num_global": 17, "num_sliding": 9, "max_num_batched_tokens": 7}
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


# Ends


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
    core.add(request_id="runs", prompt_ids=[1], sampling=GREEDY, deadline_s=soon)
    core.add(request_id="stays", prompt_ids=[2], sampling=GREEDY, deadline_s=soon + 60)
    core.add(request_id="waits", prompt_ids=[3], sampling=GREEDY, deadline_s=soon)
    assert {output.request_id for output in core.step()} == {"runs", "stays"}
    time.sleep(0.06)
    outputs = drain(core)
    assert outputs["runs"][-1].finish_reason is FinishReason.DEADLINE
    assert outputs["runs"][-1].num_output_tokens == 1
    assert outputs["waits"][-1].finish_reason is FinishReason.DEADLINE
    assert outputs["stays"][-1].finish_reason is FinishReason.LENGTH


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
                core.add(request_id=name, prompt_ids=prompt, sampling=sampling, deadline_s=late)
                accepted.add(name)
            except Overloaded:
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


# Text


def letters() -> Tokenizer:
    """A tokenizer of one letter per id, as far as a text stream looks at it."""

    class Letters:
        def token_bytes(self, token_id: int) -> bytes:
            return spell([token_id]).encode()

    return cast(Tokenizer, Letters())


def spell(token_ids: Sequence[int]) -> str:
    return "".join(chr(ord("A") + token_id) for token_id in token_ids)


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


# Refusals


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
