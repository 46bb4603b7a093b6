"""The decoder against transformers' Gemma 4, on tiny random models of the whole family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.errors import Unavailable
from cluster.placement import ExpertGroups
from cluster.spec import AttentionKind, KVLayout
from engine.runner import split
from experts.local import LocalExperts
from tests.support.engine.model_pairs import MakePair, Pair, prompt
from tests.support.engine.paged_driver import PagedDriver, Sequence
from tests.support.experts.remote_experts import remote_experts

MAX_ERROR = 1e-4
TIE = 1e-6  # a smaller gap between two routers' or logits' choices may fall either way
ROPES = {
    "sliding_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.5,
        "rope_theta": 1e4,
    },
    "full_attention": {"rope_type": "default", "rope_theta": 1e5},
}
STRETCHED = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1e6,
        "factor": 4.0,
    },
}
# Name, member, overrides. The window is 10, the prompts are 5 to 53 tokens.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("26b", "26b", {}),
    ("26b-window-over-prompt", "26b", {"sliding_window": 200, "top_k_experts": 1}),
    ("26b-bias", "26b", {"attention_bias": True, "num_key_value_heads": 1}),
    ("26b-k-and-v", "26b", {"attention_k_eq_v": False, "final_logit_softcapping": None}),
    ("26b-untied", "26b", {"tie_word_embeddings": False, "num_experts": 5, "top_k_experts": 5}),
    ("31b", "31b", {}),
    ("31b-ropes", "31b", {"rope_parameters": ROPES, "num_global_key_value_heads": 4}),
    ("31b-stretched", "31b", {"rope_parameters": STRETCHED, "sliding_window": 1}),
    ("12b", "12b", {}),
    ("12b-window-over-prompt", "12b", {"sliding_window": 300, "num_key_value_heads": 4}),
    ("e4b", "e4b", {}),
    ("e4b-double-wide", "e4b", {"use_double_wide_mlp": True, "attention_bias": True}),
    ("e4b-window-over-prompt", "e4b", {"sliding_window": 128, "final_logit_softcapping": None}),
    ("e2b", "e2b", {}),
    ("e2b-unshared", "e2b", {"num_kv_shared_layers": 0}),
    ("all-at-once", "26b", {
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
    }),
]  # fmt: skip


def keeps_one_row(member: str, overrides: dict[str, Any]) -> bool:
    return member in ("26b", "31b", "12b") and overrides.get("attention_k_eq_v", True)


@pytest.mark.parametrize(("member", "overrides"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_logits_and_greedy_tokens(
    cpu_kernels: str, make_pair: MakePair, member: str, overrides: dict[str, Any]
) -> None:
    pair = make_pair(member, **overrides)
    check_mixed_batches(pair, pair.driver())


@pytest.mark.parametrize("kv_layout", ["projection", "separate"])
@pytest.mark.parametrize(
    ("member", "overrides"),
    [c[1:] for c in CASES if keeps_one_row(*c[1:])],
    ids=[c[0] for c in CASES if keeps_one_row(*c[1:])],
)
def test_whatever_is_kept_of_a_token(
    cpu_kernels: str,
    make_pair: MakePair,
    member: str,
    overrides: dict[str, Any],
    kv_layout: KVLayout,
) -> None:
    """The layouts with both rows; the values alone are tested above."""
    pair = make_pair(member, **overrides)
    check_mixed_batches(pair, pair.driver(kv_layout=kv_layout))


@pytest.mark.parametrize(
    ("member", "overrides"),
    [c[1:] for c in CASES if c[1] == "26b"],
    ids=[c[0] for c in CASES if c[1] == "26b"],
)
def test_logits_and_greedy_tokens_with_remote_experts(
    make_pair: MakePair, member: str, overrides: dict[str, Any]
) -> None:
    pair = make_pair(member, **overrides)
    groups = ExpertGroups(pair.model.spec.num_experts, 2)
    with remote_experts(pair.path, groups) as (router, _):
        check_mixed_batches(pair, PagedDriver(pair.model, router, num_micro_batches=2))
        assert router.stats().num_calls > 0 and router.stats().num_failures == 0


def check_mixed_batches(pair: Pair, driver: PagedDriver) -> None:
    """Three requests in mixed batches, prefilled in chunks while others decode; 64 tokens each."""
    short, middle, long = (Sequence(prompt(n)) for n in (5, 21, 53))
    driver.step([(middle, 8), (short, 5)])
    for chunks in ([13, 1, 20], [None, 1, 30], [None, None, 2], [None, None, 1]):
        work = []
        for sequence, chunk in zip((middle, short, long), chunks, strict=True):
            if chunk is None or sequence.num_computed == len(sequence.token_ids):
                extend(sequence)
            work.append((sequence, chunk or 1))
        driver.step(work)
    everyone = [short, middle, long]
    while unfinished := [s for s in everyone if s.num_computed < length_of(s) + 63]:
        for sequence in unfinished:
            extend(sequence)
        driver.step([(sequence, 1) for sequence in unfinished])
    for sequence in everyone:
        extend(sequence)
        assert len(sequence.token_ids) - length_of(sequence) == 64
    num_excluded = sum(compare(pair.reference, sequence) for sequence in everyone)
    assert num_excluded <= 0.01 * sum(s.num_computed for s in everyone)


def length_of(sequence: Sequence) -> int:
    """Length of a prompt; the prompts of this test differ in their first tokens."""
    return next(n for n in (5, 21, 53) if sequence.token_ids[:5] == prompt(n)[:5])


def extend(sequence: Sequence) -> None:
    """Append the greedy token."""
    sequence.token_ids.append(int(sequence.logits[sequence.num_computed - 1].argmax()))


def compare(reference: Any, sequence: Sequence) -> int:
    """Compare all logits and all greedy tokens; returns the number of positions left out.

    transformers reads the whole sequence at once. Each token we generated must be its choice too,
    so by induction it would have generated the same.
    """
    router_gaps: list[Tensor] = []

    def watch(module: Any, _: Any, output: tuple[Tensor, ...]) -> None:
        top = output[0].topk(min(module.config.top_k_experts + 1, output[0].shape[-1])).values
        if top.shape[-1] > module.config.top_k_experts:
            router_gaps.append(top[:, -2] - top[:, -1])

    hooks = [
        module.register_forward_hook(watch)
        for name, module in reference.named_modules()
        if name.endswith(".router")
    ]
    with torch.inference_mode():
        expected = reference(torch.tensor([sequence.token_ids])).logits[0]
    for hook in hooks:
        hook.remove()
    num_computed = sequence.num_computed
    logits = torch.stack([sequence.logits[i] for i in range(num_computed)])
    error = (logits - expected[:num_computed]).abs().amax(-1)
    num_prompt = length_of(sequence)
    generated = sequence.token_ids[num_prompt:]
    is_wrong = error > MAX_ERROR
    for i, token in enumerate(generated):
        position = num_prompt - 1 + i
        is_wrong[position] |= bool(expected[position].argmax() != token)
    return excused(is_wrong, expected[:num_computed], router_gaps)


def excused(is_wrong: Tensor, expected: Tensor, router_gaps: list[Tensor]) -> int:
    """Fails unless every wrong position is a tie of two tokens, or comes after one of a router."""
    router_ties = [int((gap < TIE).nonzero()[0]) for gap in router_gaps if bool((gap < TIE).any())]
    first_tie = min(router_ties, default=len(is_wrong))
    top = expected.topk(2).values
    is_tie = top[:, 0] - top[:, 1] < TIE
    is_tie[first_tie:] = True
    wrong = is_wrong.nonzero().flatten().tolist()
    for position in wrong:
        print(f"position {position}: gap {top[position, 0] - top[position, 1]:.1e}")
    assert bool(is_tie[wrong].all())
    return len(wrong)


def test_tokens_equal_generate(make_pair: MakePair) -> None:
    """Once with transformers' own loop and cache, so that the induction above isn't alone."""
    pair = make_pair("26b")
    sequence = Sequence(prompt(21))
    driver = pair.driver()
    driver.step([(sequence, 21)])
    driver.generate(sequence, 24)
    options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None}
    expected = pair.reference.generate(torch.tensor([prompt(21)]), **options)
    assert sequence.token_ids == expected[0].tolist()


@pytest.mark.parametrize(
    ("member", "model_type"), [("26b", "gemma4"), ("e2b", "gemma4"), ("12b", "gemma4_unified")]
)
def test_text_part_of_multimodal_checkpoints(
    make_pair: MakePair, member: str, model_type: str
) -> None:
    pair = make_pair(member, model_type)
    sequence = Sequence(prompt(21))
    pair.driver().step([(sequence, 21)])
    assert compare(pair.reference, sequence) == 0


def test_one_row_takes_half_the_memory(make_pair: MakePair) -> None:
    pair = make_pair("26b")

    def num_bytes(kv_layout: KVLayout, kind: AttentionKind) -> int:
        tensors = pair.driver(kv_layout=kv_layout).runner.kv_tensors
        layers = [tensors[la.layer_idx] for la in pair.model.spec.layers if la.kind is kind]
        return sum(tensor.nbytes for layer in layers for tensor in layer.stored)

    for kind, share in ((AttentionKind.GLOBAL, 2), (AttentionKind.SLIDING, 1)):
        assert num_bytes("values", kind) == num_bytes("projection", kind) > 0
        assert num_bytes("values", kind) * share == num_bytes("separate", kind)


@pytest.mark.parametrize("member", ["e2b", "26b"])
def test_last_logits_only(make_pair: MakePair, member: str) -> None:
    """With KV-shared layers only those rows go through them; the cache must not miss anything."""
    pair = make_pair(member)
    sequence, other = Sequence(prompt(21)), Sequence(prompt(53))
    driver = pair.driver()
    driver.step([(sequence, 8), (other, 30)], all_logits=False)
    driver.step([(sequence, 13), (other, 23)], all_logits=False)
    for one in (sequence, other):
        with torch.inference_mode():
            expected = pair.reference(torch.tensor([one.token_ids])).logits[0]
        for position, logits in one.logits.items():
            assert (logits - expected[position]).abs().max() < MAX_ERROR


def test_middle_of_a_prompt_needs_no_logits(make_pair: MakePair) -> None:
    pair = make_pair("e2b")
    driver = pair.driver()
    sequence = Sequence(prompt(21))
    batch = driver.prepare([(sequence, 12)])
    nothing = torch.empty(0, dtype=torch.int64)
    assert driver.runner.execute(replace(batch, logits_indices=nothing)).shape == (0, 160)
    sequence.num_computed = 12
    driver.step([(sequence, 9)])
    with torch.inference_mode():
        expected = pair.reference(torch.tensor([sequence.token_ids])).logits[0, -1]
    assert (sequence.logits[20] - expected).abs().max() < MAX_ERROR


class RemoteLike:
    """Local experts that pretend to be remote, and keep the order of the calls."""

    is_remote = True

    def __init__(self, local: LocalExperts, fail_at: int | None = None) -> None:
        self._local, self._fail_at = local, fail_at
        self.calls: list[tuple[str, int]] = []

    def dispatch(self, layer_idx: int, *tensors: Tensor) -> tuple[int, Tensor]:
        self.calls.append(("dispatch", layer_idx))
        return layer_idx, self._local.dispatch(layer_idx, *tensors)

    def combine(self, handle: tuple[int, Tensor]) -> Tensor:
        if handle[0] == self._fail_at:
            raise Unavailable("No copy answers.")
        self.calls.append(("combine", handle[0]))
        return self._local.combine(handle[1])

    def abandon(self, handle: tuple[int, Tensor]) -> None:
        self.calls.append(("abandon", handle[0]))


def test_two_micro_batches_take_turns(make_pair: MakePair) -> None:
    pair = make_pair("26b")
    assert pair.experts is not None
    remote = RemoteLike(pair.experts)
    driver = PagedDriver(pair.model, remote, num_micro_batches=2)
    sequences = [Sequence(prompt(n)) for n in (21, 5, 53)]
    driver.step([(s, len(s.token_ids)) for s in sequences])
    assert remote.calls[:4] == [("dispatch", 0), ("dispatch", 0), ("combine", 0), ("dispatch", 1)]
    assert sum(compare(pair.reference, sequence) for sequence in sequences) == 0

    remote.calls.clear()
    alone = Sequence(prompt(21))
    driver.step([(alone, 21)])
    assert remote.calls[:2] == [("dispatch", 0), ("combine", 0)]


def test_a_failed_step_can_be_computed_again(make_pair: MakePair) -> None:
    pair = make_pair("26b")
    assert pair.experts is not None
    driver = PagedDriver(pair.model, RemoteLike(pair.experts, fail_at=3), num_micro_batches=2)
    sequences = [Sequence(prompt(n)) for n in (21, 53)]
    work = [(s, len(s.token_ids)) for s in sequences]
    with pytest.raises(Unavailable):
        driver.step(work)
    driver.runner.experts = pair.experts
    driver.step(work)
    assert sum(compare(pair.reference, sequence) for sequence in sequences) == 0


def test_split_keeps_requests_whole(make_pair: MakePair) -> None:
    driver = make_pair("26b").driver()
    sequences = [Sequence(prompt(n)) for n in (5, 21, 53)]
    batch = driver.prepare([(s, len(s.token_ids)) for s in sequences])
    first, second = split(batch)
    assert (first.query_lens, second.query_lens) == ([5, 21], [53])
    assert torch.equal(torch.cat([first.input_ids, second.input_ids]), batch.input_ids)
    assert (first.logits_indices < 26).all() and (second.logits_indices < 53).all()
