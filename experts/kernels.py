"""Grouped expert GEMMs, the sums that follow them in a fixed order, and the reference loop.

The order is what makes answers independent of who gave them. Within a group a token's weighted
expert rows are added in ascending expert id, in fp32; the sum is rounded to the hidden dtype (so
the wire carries exactly what a local computation keeps); groups are added in fp32 in id order.
`group_partials` and `sum_partials` are the only code that does either, here and on every host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.invariant import gated_gelu, linear
from cluster.packed import PackedWeight, multiply

FEW_ROWS = 32
FETCH_BYTES = 1 << 20  # what a core's second-level cache holds

# One weight for each expert: a tensor [num_experts, out, in], or each [out, in] packed.
ExpertWeights: TypeAlias = Tensor | Sequence[PackedWeight]


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

    def to(self, device: torch.device | str) -> Slots:
        """The same slots on a device."""
        return Slots(self.tokens.to(device), self.experts.to(device), self.weights.to(device))


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """The experts of one layer that a process owns, ascending by logical id.

    `expert_to_group[e]` is a position in the owner's list of groups (not a group id).
    """

    gate_up: ExpertWeights  # [num_owned, 2 * intermediate, hidden]; the gate's rows first
    down: ExpertWeights  # [num_owned, hidden, intermediate]
    expert_to_group: Tensor  # [num_owned] int64, on the weights' device
    num_groups: int


def grouped_experts(
    rows: Tensor,
    counts: list[int],
    gate_up: ExpertWeights,
    down: ExpertWeights,
    *,
    batch_invariant: bool,
) -> Tensor:
    """Each expert's gated MLP over its own run of rows.

    Shapes: rows [num_slots, hidden], sorted by expert; counts: rows of each expert, in order;
    gate_up [num_experts, 2 * intermediate, hidden], down [num_experts, hidden, intermediate].
    Returns [num_slots, hidden].
    """
    if batch_invariant:
        assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
        return _invariant_experts(rows, counts, gate_up, down)
    if rows.is_cuda and rows.dtype is torch.bfloat16:
        assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
        ends = torch.tensor(counts, device=rows.device).cumsum(0).to(torch.int32)
        inner = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends)
        return F.grouped_mm(_activate(inner), down.transpose(1, 2), offs=ends)
    inner = _multiply_runs(rows, counts, gate_up)
    return _multiply_runs(_activate(inner), counts, down)


def group_partials(
    hidden_states: Tensor, slots: Slots, experts: LayerExperts, *, batch_invariant: bool
) -> Tensor:
    """The sum of each group's weighted expert rows, per token.

    Shapes: hidden_states [num_tokens, hidden]; `slots.experts` index rows of `experts`. Returns
    [num_groups, num_tokens, hidden] in hidden_states.dtype, exact zeros where a token has no slot.
    """
    num_tokens, hidden_size = hidden_states.shape
    order = torch.argsort(slots.experts, stable=True)
    tokens, local_ids = slots.tokens[order], slots.experts[order]
    counts: list[int] = torch.bincount(local_ids, minlength=len(experts.down)).tolist()
    rows = grouped_experts(
        hidden_states[tokens],
        counts,
        experts.gate_up,
        experts.down,
        batch_invariant=batch_invariant,
    )
    weighted = rows.float().mul_(slots.weights[order].unsqueeze(1))
    cells = experts.expert_to_group[local_ids] * num_tokens + tokens
    sums = _sum_by_cell(weighted, cells, experts.num_groups * num_tokens)
    return sums.to(hidden_states.dtype).view(experts.num_groups, num_tokens, hidden_size)


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


def _multiply_runs(rows: Tensor, counts: list[int], weights: ExpertWeights) -> Tensor:
    """rows [n, in] in runs of `counts`, each times its own weight [out, in] transposed."""
    outputs = []
    start = 0
    for expert, count in enumerate(counts):
        if count:
            outputs.append(multiply(rows[start : start + count], weights[expert]))
            start += count
    return torch.cat(outputs) if outputs else rows.new_empty(0, weights[0].shape[0])


def _fetch(weight: Tensor, num_rows: int) -> None:
    """Read an expert's weight into a CPU's cache in one stream.

    A product with few rows waits for memory in an order that no prefetcher follows: fetching first
    took it from 21 to 14 ms for 384 experts of 256 x 128 at 2 rows (MKL, one thread of a Zen 4).
    """
    if num_rows < FEW_ROWS and not weight.is_cuda and weight.nbytes <= FETCH_BYTES:
        weight.sum()


def _activate(inner: Tensor) -> Tensor:
    gate, up = inner.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def _invariant_experts(rows: Tensor, counts: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
    output = rows.new_empty(rows.shape[0], down.shape[1])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            stop = start + count
            own = rows[start:stop].clone()  # a GEMM's bits may depend on its input's alignment
            _fetch(gate_up[expert], count)
            gate, up = linear(own, gate_up[expert]).chunk(2, dim=-1)
            inner = gated_gelu(gate, up, batch_invariant=True)
            _fetch(down[expert], count)
            output[start:stop] = linear(inner, down[expert])
            start = stop
    return output


def _sum_by_cell(rows: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    """Add fp32 rows into their cells, each cell's rows in the order given: [num_cells, hidden]."""
    sums = rows.new_zeros(num_cells, rows.shape[1])
    if not rows.is_cuda:
        return sums.index_add_(0, cells, rows)  # sequential on a CPU
    # On CUDA index_add_ adds in any order; segment_reduce walks a segment from start to end.
    by_cell = torch.argsort(cells, stable=True)
    lengths = torch.bincount(cells, minlength=num_cells)
    return torch.segment_reduce(rows[by_cell], "sum", lengths=lengths, axis=0, initial=0)
