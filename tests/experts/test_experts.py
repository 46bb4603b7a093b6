"""Experts in-process: the fast path equals the obvious loop, whatever the cut into groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.checkpoint import Checkpoint
from cluster.errors import CheckpointError
from cluster.placement import ExpertGroups
from experts.local import LocalExperts
from experts.stats import ExpertLoad
from experts.summation import reference_experts
from experts.weights import load_experts
from tests.support.experts.remote_experts import remote_experts
from tests.support.experts.tiny_experts import NUM_EXPERTS, random_topk, save_experts, tiny_spec

SPEC = tiny_spec()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_experts(tmp_path_factory.mktemp("experts")))


def plain(checkpoint: Checkpoint, layer_idx: int) -> list[Tensor]:
    """gate_up and down of all experts of a layer."""
    prefix = f"{SPEC.tensor_prefix}layers.{layer_idx}.experts."
    names = [f"{prefix}gate_up_proj", f"{prefix}down_proj"]
    return [checkpoint.read(name, checkpoint.shape(name)) for name in names]


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("num_groups", [1, 3, 8])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 33])
def test_local_equals_reference(
    cpu_kernels: str,
    checkpoint: Checkpoint,
    num_groups: int,
    num_tokens: int,
    batch_invariant: bool,
) -> None:
    groups = ExpertGroups(NUM_EXPERTS, num_groups)
    experts = LocalExperts(
        SPEC, checkpoint, groups, dtype=torch.float32, batch_invariant=batch_invariant
    )
    hidden, ids, weights = random_topk(SPEC, num_tokens)
    for layer_idx in range(SPEC.num_layers):
        output = experts.combine(experts.dispatch(layer_idx, hidden, ids, weights))
        expected = reference_experts(hidden, ids, weights, *plain(checkpoint, layer_idx))
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_bf16_is_close_to_fp32(checkpoint: Checkpoint) -> None:
    groups = ExpertGroups(NUM_EXPERTS, 2)
    hidden, ids, weights = random_topk(SPEC, 9)
    exact = LocalExperts(SPEC, checkpoint, groups, dtype=torch.float32)
    rounded = LocalExperts(SPEC, checkpoint, groups, dtype=torch.bfloat16)
    expected = exact.combine(exact.dispatch(0, hidden, ids, weights))
    output = rounded.combine(rounded.dispatch(0, hidden.bfloat16(), ids, weights))
    assert output.dtype is torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_rows_do_not_see_each_other(
    cpu_kernels: str, checkpoint: Checkpoint, dtype: torch.dtype
) -> None:
    groups = ExpertGroups(NUM_EXPERTS, 3)
    experts = LocalExperts(SPEC, checkpoint, groups, dtype=dtype, batch_invariant=True)
    hidden, ids, weights = random_topk(SPEC, 70)
    hidden = hidden.to(dtype)
    whole = experts.combine(experts.dispatch(1, hidden, ids, weights))
    for part in (slice(0, 1), slice(5, 7), slice(11, 60), slice(69, 70)):
        alone = experts.dispatch(1, hidden[part], ids[part], weights[part])
        assert torch.equal(experts.combine(alone), whole[part])


def test_the_order_of_a_tokens_choices_changes_no_bit(checkpoint: Checkpoint) -> None:
    experts = LocalExperts(SPEC, checkpoint, ExpertGroups(NUM_EXPERTS, 2), dtype=torch.float32)
    hidden, ids, weights = random_topk(SPEC, 12)
    flipped = experts.dispatch(0, hidden, ids.flip(1), weights.flip(1))
    assert torch.equal(flipped, experts.dispatch(0, hidden, ids, weights))


def test_only_owned_slices_are_read(checkpoint: Checkpoint) -> None:
    groups = ExpertGroups(NUM_EXPERTS, 4)
    dtype = torch.bfloat16  # whose weights keep their layout
    everything = load_experts(SPEC, checkpoint, groups, range(4), dtype=dtype)
    owned = load_experts(SPEC, checkpoint, groups, (3, 0), dtype=dtype)
    experts = [*groups.experts_of(0), *groups.experts_of(3)]
    assert owned.group_ids == (0, 3)
    assert owned.num_bytes * 2 == everything.num_bytes
    for layer_idx, part in enumerate(owned.layers):
        gate_up, down = plain(checkpoint, layer_idx)
        assert isinstance(part.gate_up, Tensor) and isinstance(part.down, Tensor)
        assert torch.equal(part.gate_up, gate_up[experts].to(dtype))
        assert torch.equal(part.down, down[experts].to(dtype))
        assert part.expert_to_group.tolist() == [0, 0, 1, 1]
    assert owned.expert_to_row.tolist() == [0, 1, -1, -1, -1, -1, 2, 3]


def test_a_wrong_shape_names_the_tensor(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"layers\.0\.experts\.gate_up_proj"):
        LocalExperts(
            tiny_spec(hidden=64), checkpoint, ExpertGroups(NUM_EXPERTS, 1), dtype=torch.float32
        )


def test_load_counts_by_layer_and_expert() -> None:
    load = ExpertLoad(num_layers=2, num_experts=4)
    load.count(1, torch.tensor([0, 3, 3]).numpy())
    load.count(0, torch.tensor([2]).numpy())
    assert load.total.tolist() == [[0, 0, 1, 0], [1, 0, 0, 2]]


def test_a_router_counts_what_its_hosts_count(tmp_path: Path) -> None:
    with remote_experts(save_experts(tmp_path), ExpertGroups(NUM_EXPERTS, 3)) as (router, hosts):
        for layer_idx in range(SPEC.num_layers):
            hidden, ids, weights = random_topk(SPEC, 5 + layer_idx)
            router.combine(router.dispatch(layer_idx, hidden, ids, weights))
        total = router.load.total
        assert total.sum() == (5 + 6) * SPEC.top_k_experts
        assert (total == sum(host.load.total for host in hosts)).all()
