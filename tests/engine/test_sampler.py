"""Sampler: against an obvious reference, statistics, and the same token in any batch."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.request import Request, SamplingParams
from engine.sampler import Sampler, _top_k, _top_p, draw, uniform

VOCAB = 50


def request(
    seed: int = 0, prompt: tuple[int, ...] = (1,), output: tuple[int, ...] = (), **params: Any
) -> Request:
    sampling = SamplingParams(**params)
    return Request("r", list(prompt), sampling, seed, max_tokens=100, output_ids=list(output))


def reference_probs(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """The distribution to draw from, by plain loops: token id -> probability."""
    best = max(logits)
    probs = {i: math.exp((x - best) / params.temperature) for i, x in enumerate(logits)}
    ranked = sorted(probs, key=lambda i: (-logits[i], i))
    if params.top_k is not None:
        ranked = ranked[: params.top_k]
    total = sum(probs[i] for i in ranked)
    kept, mass = [], 0.0
    for i in ranked:
        if mass < params.top_p * total or params.top_p == 1:
            kept.append(i)
        mass += probs[i]
    kept = [i for i in kept if probs[i] >= params.min_p]
    total = sum(probs[i] for i in kept)
    return {i: probs[i] / total for i in kept if probs[i] > 0}


def support(logits: Tensor, params: SamplingParams, num_draws: int = 400) -> Counter[int]:
    """What evenly spaced numbers draw: a histogram as exact as num_draws."""
    return Counter(draw(logits, params, (i + 0.5) / num_draws) for i in range(num_draws))


# Against the reference

filters: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 0.7, 1.0, 2.5]),
        "top_k": st.sampled_from([None, 1, 2, 5, 49, 50, 51, 10**6]),
        "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.1, 1e-9]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    }
)


@settings(max_examples=60, deadline=None)
@given(params=filters.map(lambda p: SamplingParams(**p)), seed=st.integers(0, 2**32))
def test_the_distribution_is_the_reference(params: SamplingParams, seed: int) -> None:
    logits = 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))
    drawn, expected = support(logits, params), reference_probs(logits.tolist(), params)
    assert set(drawn) <= set(expected)
    for token_id in set(drawn) | set(expected):
        assert abs(drawn[token_id] / 400 - expected[token_id]) <= 1 / 400 + 1e-6


def test_among_equals_the_lower_id_is_kept() -> None:
    logits = torch.zeros(VOCAB)
    assert set(support(logits, SamplingParams(top_k=3))) == {0, 1, 2}
    assert set(support(logits, SamplingParams(top_p=0.2))) == set(range(10))
    assert set(support(logits, SamplingParams(top_k=4, top_p=0.5))) == {0, 1}
    assert set(support(logits, SamplingParams(min_p=1.0))) == set(range(VOCAB))


def test_among_many_equals_too() -> None:
    """Ties as frequent as in bf16 logits: an unstable sort would show."""
    levels = torch.randint(0, 4, (5000,), generator=torch.Generator().manual_seed(0))
    ranked = sorted(range(5000), key=lambda i: (-int(levels[i]), i))
    for count in (100, 1500, 3000):
        assert _top_k(levels.float(), count)[0].tolist() == ranked[:count]
        weights = levels.double().numpy()
        top_p = (weights[ranked[:count]].sum() - 0.5) / weights.sum()
        assert _top_p(weights, top_p).tolist() == ranked[:count]


def test_extremes_of_temperature() -> None:
    logits = torch.tensor([1.0, 3.0, 2.999, -1e30])
    for temperature in (1e-6, 1e-300, 5e-324):
        assert set(support(logits, SamplingParams(temperature=temperature))) == {1}
    assert set(support(logits, SamplingParams(temperature=100))) == {0, 1, 2}


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((VOCAB,), -math.inf)
    logits[[3, 7]] = 1.0
    changes: list[dict[str, Any]] = [{}, {"top_k": 5}, {"top_p": 0.99}, {"min_p": 0.01}]
    for params in changes:
        assert set(support(logits, SamplingParams(**params))) == {3, 7}
    for u in (0.0, 1 - 2.0**-52):
        assert draw(logits, SamplingParams(), u) in (3, 7)


def test_the_largest_u_stays_in_the_vocabulary() -> None:
    for vocab in range(1, 200):
        assert draw(torch.randn(vocab), SamplingParams(), 1 - 2.0**-52) < vocab


# Statistics


def chi_square(counts: Counter[int], probs: dict[int, float]) -> float:
    total = sum(counts.values())
    return sum((counts[i] - total * p) ** 2 / (total * p) for i, p in probs.items())


@pytest.mark.parametrize("over", ["seeds", "positions"])
@pytest.mark.parametrize("params", [{}, {"top_k": 4}, {"top_p": 0.8, "temperature": 1.5}])
def test_frequencies_are_the_probabilities(over: str, params: dict[str, Any]) -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 0.0, 1.5])
    sampling = SamplingParams(**params)
    keys = range(4000)
    drawn = (uniform(i, 17) if over == "seeds" else uniform(17, i) for i in keys)
    counts = Counter(draw(logits, sampling, u) for u in drawn)
    probs = reference_probs(logits.tolist(), sampling)
    assert set(counts) <= set(probs)
    assert chi_square(counts, probs) < 26  # 7 degrees of freedom: p = 0.0005; the seeds are fixed


def test_uniform_numbers_look_independent() -> None:
    num = 20_000
    for pairs in (
        [(uniform(i, 5), uniform(i + 1, 5)) for i in range(num)],
        [(uniform(5, i), uniform(5, i + 1)) for i in range(num)],
        [(uniform(i << 40, 0), uniform(i << 40, 1 << 20)) for i in range(num)],
    ):
        cells = Counter(int(a * 8) * 8 + int(b * 8) for a, b in pairs)
        assert chi_square(cells, dict.fromkeys(range(64), 1 / 64)) < 110  # 63 degrees: p = 0.0002
    assert all(0 <= uniform(seed, 2**31) < 1 for seed in (0, 1, 2**63 - 1))


# Penalties


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_penalties_are_the_reference(data: st.DataObject) -> None:
    token_ids = st.lists(st.integers(0, VOCAB - 1), max_size=8)
    prompt, output = (1, *data.draw(token_ids)), tuple(data.draw(token_ids))
    repetition, presence, frequency = 1.5, data.draw(st.floats(-2, 2)), data.draw(st.floats(-2, 2))
    logits = 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(len(output)))

    expected = logits.tolist()
    for i in range(VOCAB):
        if i in prompt + output:
            expected[i] = expected[i] / repetition if expected[i] > 0 else expected[i] * repetition
        expected[i] -= frequency * output.count(i) + presence * (i in output)

    asked = request(
        prompt=prompt,
        output=output[:2],
        temperature=0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    sampler = Sampler()
    sampler.sample(logits[None], [asked])  # counts the first tokens; the others come later
    asked.output_ids += output[2:]
    got = sampler._penalised(logits, asked)
    assert torch.allclose(got, torch.tensor(expected), atol=1e-5)
    assert sampler.sample(logits[None], [asked]).token_ids == [int(got.argmax())]


def test_histories_go_with_their_requests() -> None:
    sampler = Sampler()
    asked = request(presence_penalty=1.0)
    sampler.sample(torch.randn(1, VOCAB), [asked])
    assert len(sampler._histories) == 1
    del asked
    assert len(sampler._histories) == 0


# Batches

PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 3},
    {},
    {"temperature": 0.7, "top_k": 20},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
    {"top_p": 0.9, "logprobs": 2},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 0, "frequency_penalty": 0.5},
]


@pytest.mark.parametrize("vocab", [50, 1283, 40_001])
def test_the_batch_changes_no_bit(vocab: int) -> None:
    """Rounded logits have many ties, odd sizes misalign the rows."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(24, vocab, generator=generator) * 8).round() / 4
    requests = [request(i, output=(i, i, 3), **PARAMS[i % len(PARAMS)]) for i in range(24)]
    alone = [Sampler().sample(logits[i : i + 1].clone(), [requests[i]]) for i in range(24)]
    shuffle = random.Random(vocab)
    for size in (24, 24, 13, 7, 2):
        rows = shuffle.sample(range(24), size)
        output = Sampler().sample(logits[rows], [requests[i] for i in rows])
        assert output.token_ids == [alone[i].token_ids[0] for i in rows]
        assert output.logprobs == [alone[i].logprobs[0] for i in rows]
        assert not output.errors


def test_a_seed_reproduces_and_position_moves_on() -> None:
    logits = torch.zeros(1, 1000)

    def run(seed: int) -> list[int]:
        asked = request(seed)
        for _ in range(20):
            asked.output_ids += Sampler().sample(logits, [asked]).token_ids
        return asked.output_ids

    assert run(1) == run(1) != run(2)
    assert len(set(run(1))) > 15


def test_the_logits_are_left_as_they_are() -> None:
    logits = torch.randn(len(PARAMS), VOCAB)
    before = logits.clone()
    Sampler().sample(logits, [request(**params) for params in PARAMS])
    assert torch.equal(logits, before)


def test_greedy_is_one_argmax() -> None:
    logits = torch.randn(16, 1000)
    output = Sampler().sample(logits, [request(temperature=0)] * 16)
    assert output.token_ids == logits.argmax(-1).tolist()
    assert output.logprobs == [None] * 16


def test_an_empty_batch() -> None:
    assert Sampler().sample(torch.zeros(0, VOCAB), []).token_ids == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", PARAMS)
def test_a_broken_row_disturbs_no_other(bad: float, params: dict[str, Any]) -> None:
    logits = torch.randn(3, VOCAB)
    good = Sampler().sample(logits, [request(i, **params) for i in range(3)])
    logits[1, 17] = bad
    output = Sampler().sample(logits, [request(i, **params) for i in range(3)])
    assert list(output.errors) == [1]
    assert "not finite" in output.errors[1]
    assert [output.token_ids[0], output.token_ids[2]] == [good.token_ids[0], good.token_ids[2]]


def test_a_row_of_nothing_is_an_error() -> None:
    output = Sampler().sample(torch.full((1, VOCAB), -math.inf), [request()])
    assert list(output.errors) == [0]


# Logprobs


def test_logprobs_are_the_models_own() -> None:
    """Whatever the temperature, the filters and the penalties."""
    logits = torch.randn(1, VOCAB)
    expected = logits[0].double().log_softmax(0)
    asked = request(logprobs=4, temperature=0.2, top_k=2, presence_penalty=2.0, output=(3,))
    output = Sampler().sample(logits, [asked])
    got = output.logprobs[0]
    assert got is not None
    assert got.logprob == pytest.approx(float(expected[output.token_ids[0]]), abs=1e-9)
    assert [i for i, _ in got.alternatives] == expected.topk(4).indices.tolist()
    assert [p for _, p in got.alternatives] == pytest.approx(expected.topk(4).values.tolist())


def test_logprobs_without_alternatives_and_beyond_the_vocabulary() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0]])
    none, all_three = (request(logprobs=num, temperature=0) for num in (0, 20))
    output = Sampler().sample(logits.expand(2, -1), [none, all_three])
    assert output.logprobs[0] is not None and output.logprobs[1] is not None
    assert output.logprobs[0].alternatives == []
    assert [i for i, _ in output.logprobs[1].alternatives] == [0, 1, 2]
