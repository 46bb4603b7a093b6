"""Kernels by PyTorch's operations: any device and dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.kernels import invariant
from cluster.kernels.interface import (
    ExpertSlots,
    KVWrite,
    LayerExperts,
    PagedAttention,
    Weight,
)


class TorchKernels:
    """Implements Kernels in plain PyTorch; the reference that the others are compared with."""

    name = "PyTorch"
    attend: PagedAttention | None = None
    reads_free_slots = True

    def pack(self, weight: Tensor) -> Weight:
        return weight

    def pack_gated(self, weight: Tensor) -> Weight:
        return weight

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, _plain(weight), bias)

    def gated_gelu(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh") * up

    def gated_mlp(self, x: Tensor, gate_up: Weight, down: Weight) -> Tensor:
        gate, up = self.linear(x, gate_up).chunk(2, dim=-1)
        return self.linear(self.gated_gelu(gate, up), down)

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    def add_norm(
        self, residual: Tensor, x: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None
    ) -> Tensor:
        total = residual + self.rms_norm(x, weight, eps)
        return total if scale is None else total * scale

    def norm_and_rotate(
        self,
        qkv: Tensor,
        num_queries: int,
        norm_weight: Tensor,
        eps: float,
        rotation: tuple[Tensor, Tensor],
        kv: KVWrite | None,
    ) -> Tensor:
        heads = self.rms_norm(qkv, None, eps)
        cos, sin = rotation
        rotated = rotate(heads[:, : len(norm_weight)] * norm_weight, cos, sin)
        if kv is not None:
            if kv.keys is not None:
                kv.keys.index_copy_(0, kv.kv_slots, rotated[:, num_queries:])
            kv.values.index_copy_(0, kv.kv_slots, heads[:, -kv.values.shape[1] :])
        return rotated[:, :num_queries]

    def top_k_experts(
        self, scores: Tensor, k: int, per_expert_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32)
        weights, ids = torch.topk(probabilities, k)
        return ids, weights / weights.sum(-1, keepdim=True) * per_expert_scale[ids]

    def expert_partials(
        self, hidden_states: Tensor, slots: ExpertSlots, experts: LayerExperts
    ) -> Tensor:
        num_tokens, hidden_size = hidden_states.shape
        gate_up, down = _plain(experts.gate_up), _plain(experts.down)
        order = torch.argsort(slots.experts, stable=True)
        tokens, expert_rows = slots.tokens[order], slots.experts[order]
        counts: list[int] = torch.bincount(expert_rows, minlength=len(down)).tolist()
        outputs = self.grouped_mlp(hidden_states[tokens], counts, gate_up, down)
        weighted = outputs.float().mul_(slots.weights[order].unsqueeze(1))
        cells = experts.expert_to_group[expert_rows] * num_tokens + tokens
        sums = _sum_by_cell(weighted, cells, experts.num_groups * num_tokens)
        return sums.to(hidden_states.dtype).view(experts.num_groups, num_tokens, hidden_size)

    def expert_rows(
        self,
        hidden_states: Tensor,
        slot_table: Tensor,
        expert_to_row: Tensor,
        experts: LayerExperts,
    ) -> Tensor | None:
        slots = ExpertSlots.from_table(slot_table.to(hidden_states.device))
        slots = ExpertSlots(slots.tokens, expert_to_row[slots.experts], slots.weights)
        if bool((slots.experts < 0).any()):
            return None
        partials = self.expert_partials(hidden_states, slots, experts)
        has_slot = torch.zeros(partials.shape[:2], dtype=torch.bool, device=partials.device)
        has_slot[experts.expert_to_group[slots.experts], slots.tokens] = True
        return partials[has_slot]

    def grouped_mlp(self, x: Tensor, counts: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
        """Compute each expert's gated MLP over its own run of x.

        Args:
            x: [num_slots, hidden], sorted by expert.
            counts: length of each expert's run, in order.
            gate_up: [num_experts, 2 * intermediate, hidden].
            down: [num_experts, hidden, intermediate].

        Returns:
            [num_slots, hidden].
        """
        if not x.is_cuda or x.dtype is not torch.bfloat16:
            return self._mlp_of_each(x, counts, gate_up, down)
        ends = torch.tensor(counts, device=x.device).cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(x, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        return F.grouped_mm(self.gated_gelu(gate, up), down.transpose(1, 2), offs=ends)

    def _mlp_of_each(self, x: Tensor, counts: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
        runs = [
            # A copy: the bits of a product may depend on how its input lies in memory.
            self.gated_mlp(run.clone(), gate_up[expert], down[expert])
            for expert, run in enumerate(torch.split(x, counts))
            if len(run)
        ]
        return torch.cat(runs) if runs else torch.empty_like(x)


class InvariantKernels(TorchKernels):
    """Implements Kernels with products and activations whose bits don't depend on the batch."""

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        return invariant.linear(x, _plain(weight), bias)

    def gated_gelu(self, gate: Tensor, up: Tensor) -> Tensor:
        return invariant.gated_gelu(gate, up)

    def grouped_mlp(self, x: Tensor, counts: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
        return self._mlp_of_each(x, counts, gate_up, down)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of every head.

    Args:
        x: [num_tokens, num_heads, head_dim].
        cos: [num_tokens, 1, head_dim].
        sin: [num_tokens, 1, head_dim], the first half negated.
    """
    swapped = x.roll(x.shape[-1] // 2, -1)
    return (x * cos).add_(swapped.mul_(sin))


def _plain(weight: Weight) -> Tensor:
    assert isinstance(weight, Tensor), "packed for other kernels"
    return weight


def _sum_by_cell(terms: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    """Add fp32 terms into their cells, each cell's in the order given: [num_cells, hidden]."""
    sums = terms.new_zeros(num_cells, terms.shape[1])
    if not terms.is_cuda:
        return sums.index_add_(0, cells, terms)  # sequential on a CPU
    # On CUDA index_add_ adds in any order; segment_reduce walks a segment from start to end.
    by_cell = torch.argsort(cells, stable=True)
    lengths = torch.bincount(cells, minlength=num_cells)
    return torch.segment_reduce(terms[by_cell], "sum", lengths=lengths, axis=0, initial=0)
