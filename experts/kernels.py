"""Grouped expert GEMMs, the sums that follow them in a fixed order, and the reference loop.

The order is what makes answers independent of who gave them. Within a group a token's weighted
expert rows are added in ascending expert id, in fp32; the sum is rounded to the hidden dtype (so
the wire carries exactly what a local computation keeps); groups are added in fp32 in id order.
`group_partials` and `sum_partials` are the only code that does either, here and on every host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.kernels.interface import InvariantKernels, Kernels, PackedWeight, Weight
from cluster.kernels.native import NativeKernels


@dataclass(frozen=True, slots=True)
class Slots:
    """(token, expert, weight) triples: which rows go to which experts.

    All three have shape [num_slots]; tokens and experts are int64, weights fp32.
    """

    tokens: Tensor
    experts: Tensor  # logical ids when dispatched; rows of LayerExperts once localised
    weights: Tensor

    @staticmethod
    def from_topk(topk_ids: Tensor, topk_weights: Tensor) -> Slots:
        """Every choice of every token, in token order. Shapes: both [num_tokens, k]."""
        num_tokens, top_k = topk_ids.shape
        tokens = torch.arange(num_tokens, device=topk_ids.device).repeat_interleave(top_k)
        return Slots(tokens, topk_ids.reshape(-1), topk_weights.reshape(-1).float())

    @staticmethod
    def from_table(table: Tensor) -> Slots:
        """Of the three in one tensor, as a frame has them: [3, num_slots] int32, the last row being
        the bits of the weights.
        """
        tokens, experts, weights = table
        return Slots(tokens.long(), experts.long(), weights.view(torch.float32))


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """The experts of one layer that a process owns, ascending by logical id.

    `expert_to_group[e]` is a position in the owner's list of groups (not a group id).
    """

    kernels: Kernels
    gate_up: Weight  # [num_owned, 2 * intermediate, hidden]; the gate's rows first
    down: Weight  # [num_owned, hidden, intermediate]
    expert_to_group: Tensor  # [num_owned] int64, on the weights' device
    num_groups: int


def group_partials(hidden_states: Tensor, slots: Slots, experts: LayerExperts) -> Tensor:
    """The sum of each group's weighted expert rows, per token.

    Shapes: hidden_states [num_tokens, hidden]; `slots.experts` index rows of `experts`. Returns
    [num_groups, num_tokens, hidden] in hidden_states.dtype, exact zeros where a token has no slot.
    """
    gate_up, down, kernels = experts.gate_up, experts.down, experts.kernels
    if isinstance(kernels, NativeKernels):
        assert isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight)
        parts = slots.tokens, slots.experts, slots.weights
        return kernels.expert_partials(
            hidden_states, parts, gate_up, down, experts.expert_to_group, experts.num_groups
        )
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    num_tokens, hidden_size = hidden_states.shape
    order = torch.argsort(slots.experts, stable=True)
    tokens, local_ids = slots.tokens[order], slots.experts[order]
    counts: list[int] = torch.bincount(local_ids, minlength=len(down)).tolist()
    rows = grouped_experts(hidden_states[tokens], counts, gate_up, down, kernels)
    weighted = rows.float().mul_(slots.weights[order].unsqueeze(1))
    cells = experts.expert_to_group[local_ids] * num_tokens + tokens
    sums = _sum_by_cell(weighted, cells, experts.num_groups * num_tokens)
    return sums.to(hidden_states.dtype).view(experts.num_groups, num_tokens, hidden_size)


def grouped_experts(
    rows: Tensor, counts: list[int], gate_up: Tensor, down: Tensor, kernels: Kernels
) -> Tensor:
    """Each expert's gated MLP over its own run of rows.

    Shapes: rows [num_slots, hidden], sorted by expert; counts: rows of each expert, in order;
    gate_up [num_experts, 2 * intermediate, hidden], down [num_experts, hidden, intermediate].
    Returns [num_slots, hidden].
    """
    is_invariant = isinstance(kernels, InvariantKernels)
    if rows.is_cuda and rows.dtype is torch.bfloat16 and not is_invariant:
        ends = torch.tensor(counts, device=rows.device).cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        return F.grouped_mm(kernels.gated_gelu(gate, up), down.transpose(1, 2), offs=ends)
    runs = [
        # A copy: the bits of a product may depend on how its input lies in memory.
        kernels.gated_mlp(run.clone(), gate_up[expert], down[expert])
        for expert, run in enumerate(torch.split(rows, counts))
        if len(run)
    ]
    return torch.cat(runs) if runs else torch.empty_like(rows)


def group_rows(
    hidden_states: Tensor, slot_table: Tensor, expert_to_row: Tensor, experts: LayerExperts
) -> Tensor | None:
    """What an expert host answers: the rows of `group_partials` of the (group, token) pairs that
    have a slot, in order; None if an expert isn't among `experts`.

    Shapes: hidden_states [num_tokens, hidden]; slot_table [3, num_slots] int32, see
    `Slots.from_table`, by logical ids, which expert_to_row turns into rows of `experts`, or -1.
    """
    gate_up, down, kernels = experts.gate_up, experts.down, experts.kernels
    groups = experts.expert_to_group
    if isinstance(kernels, NativeKernels):
        assert isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight)
        return kernels.expert_rows(
            hidden_states, slot_table, expert_to_row, gate_up, down, groups, experts.num_groups
        )
    slots = Slots.from_table(slot_table.to(hidden_states.device))
    slots = Slots(slots.tokens, expert_to_row[slots.experts], slots.weights)
    if bool((slots.experts < 0).any()):
        return None
    partials = group_partials(hidden_states, slots, experts)
    has_slot = torch.zeros(partials.shape[:2], dtype=torch.bool, device=partials.device)
    has_slot[groups[slots.experts], slots.tokens] = True
    return partials[has_slot]


def sum_partials(partials: Tensor) -> Tensor:
    """Add the groups' partials in fp32, in id order; the result has the partials' dtype.

    Shapes: [num_groups, num_tokens, hidden], every group in id order -> [num_tokens, hidden].
    """
    total = partials[0].float()
    for partial in partials[1:]:
        total = total + partial
    return total.to(partials.dtype)


def reference_experts(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """The obvious loop over tokens and their experts, for tests. Weights of all experts, in order.

    Shapes: hidden_states [num_tokens, hidden], topk_* [num_tokens, k] -> [num_tokens, hidden].
    """
    output = torch.zeros_like(hidden_states, dtype=torch.float32)
    for token, (ids, weights) in enumerate(zip(topk_ids, topk_weights, strict=True)):
        for expert, weight in zip(ids.tolist(), weights, strict=True):
            gate, up = (gate_up[expert] @ hidden_states[token]).chunk(2)
            row = down[expert] @ (F.gelu(gate, approximate="tanh") * up)
            output[token] += weight * row.float()
    return output.to(hidden_states.dtype)


def _sum_by_cell(rows: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    """Add fp32 rows into their cells, each cell's rows in the order given: [num_cells, hidden]."""
    sums = rows.new_zeros(num_cells, rows.shape[1])
    if not rows.is_cuda:
        return sums.index_add_(0, cells, rows)  # sequential on a CPU
    # On CUDA index_add_ adds in any order; segment_reduce walks a segment from start to end.
    by_cell = torch.argsort(cells, stable=True)
    lengths = torch.bincount(cells, minlength=num_cells)
    return torch.segment_reduce(rows[by_cell], "sum", lengths=lengths, axis=0, initial=0)
