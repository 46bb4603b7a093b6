"""A layer's routed tokens: hosts' shares and how their rows add up, native and in PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.kernels.interface import ExpertSlots
from cluster.placement import ExpertGroups
from experts.routed_tokens import ExpertGroupTable, RoutedTokens
from experts.summation import sum_partials

NUM_EXPERTS, TOP_K, HIDDEN = 12, 3, 5


def make(num_tokens: int, num_groups: int, seed: int, is_native: bool) -> RoutedTokens:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
    weights, ids = scores.topk(TOP_K)
    table = ExpertGroupTable(ExpertGroups(NUM_EXPERTS, num_groups), use_native=is_native)
    assert (table.native is not None) == is_native
    return RoutedTokens(table, ids, weights)


@pytest.mark.parametrize("is_native", [True, False])
@settings(deadline=None)
@given(
    num_tokens=st.integers(0, 20),
    num_groups=st.integers(1, 5),
    asked=st.sets(st.integers(0, NUM_EXPERTS - 1)),
    seed=st.integers(0, 99),
)
def test_the_slots_of_some_experts(
    is_native: bool, num_tokens: int, num_groups: int, asked: set[int], seed: int
) -> None:
    routed = make(num_tokens, num_groups, seed, is_native)
    is_asked = torch.tensor([expert in asked for expert in range(NUM_EXPERTS)])
    expected = [
        (token, expert, weight)
        for token in range(num_tokens)
        for expert, weight in zip(
            routed.topk_ids[token].tolist(), routed.topk_weights[token].tolist(), strict=True
        )
        if expert in asked
    ]
    slots = routed.select(is_asked)
    if slots is None:
        assert not expected
        return
    hidden_states = torch.rand(num_tokens, HIDDEN)
    rows, unpacked = slots.rows_of(hidden_states), slots.unpack()
    assert {token for token, _, _ in expected} == set(_tokens(slots.tokens, num_tokens))
    tokens = torch.tensor(_tokens(slots.tokens, num_tokens))[unpacked.tokens].tolist()
    columns = (tokens, unpacked.experts.tolist(), unpacked.weights.tolist())
    assert list(zip(*columns, strict=True)) == expected
    assert torch.equal(rows[unpacked.tokens], hidden_states[tokens])


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(deadline=None)
@given(num_tokens=st.integers(1, 20), num_groups=st.integers(1, 5), seed=st.integers(0, 99))
def test_rows_add_up_to_the_bits_of_the_dense_partials(
    is_native: bool, dtype: torch.dtype, num_tokens: int, num_groups: int, seed: int
) -> None:
    routed = make(num_tokens, num_groups, seed, is_native)
    groups = torch.tensor(
        [ExpertGroups(NUM_EXPERTS, num_groups).group_of(expert) for expert in range(NUM_EXPERTS)]
    )
    has_slot = torch.zeros(num_groups, num_tokens, dtype=torch.bool)
    slots = ExpertSlots.from_topk(routed.topk_ids, routed.topk_weights)
    has_slot[groups[slots.experts], slots.tokens] = True
    generator = torch.Generator().manual_seed(seed)
    partials = torch.randn(num_groups, num_tokens, HIDDEN, generator=generator).to(dtype)
    partials[torch.rand(partials.shape, generator=generator) < 0.2] = -0.0
    partials[~has_slot] = 0.0
    group_rows = [partial[mask] for partial, mask in zip(partials, has_slot, strict=True)]
    assert routed.count_rows() == [len(rows) for rows in group_rows]
    total = routed.sum_groups(group_rows)
    assert total.dtype is dtype
    assert total.view(torch.uint8).equal(sum_partials(partials).view(torch.uint8))


def _tokens(tokens: Tensor | None, num_tokens: int) -> list[int]:
    return list(range(num_tokens)) if tokens is None else tokens.tolist()
