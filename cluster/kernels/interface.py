"""The arithmetic of a layer behind one interface, with an implementation for each kind of machine.

TorchKernels is the reference, on any device. InvariantKernels keeps batch_invariant there;
NativeKernels keeps it by construction and is the fastest on a CPU. Code of the model and of the
experts is written once against `Kernels` and never asks which it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in the native kernels' layout, or a stack of them, one per expert.

    A gated weight is the gate's outputs, then as many of the up projection.
    """

    panels: Tensor  # [..., num_panels, num_inputs, 32] fp32
    num_outputs: int  # of the product; of the gate alone where gated

    @property
    def nbytes(self) -> int:
        """Memory of the weight, padding included."""
        return self.panels.nbytes


Weight: TypeAlias = Tensor | PackedWeight


class KVWrite(NamedTuple):
    """Where a layer writes this step's keys and values."""

    kv_slots: Tensor  # [num_tokens] int64, of the KV cache
    keys: Tensor | None  # [num_kv_slots, num_kv_heads, head_dim]; None where no keys are cached
    values: Tensor  # [num_kv_slots, num_kv_heads, head_dim]


class KeyFormation(NamedTuple):
    """How keys are formed from cached values where both share one projection."""

    norm_weight: Tensor  # [head_dim], of the k_norm
    cos: Tensor  # [num_positions, num_rotating]
    sin: Tensor  # [num_positions, num_rotating]
    eps: float | None  # of the norm that raw projections are taken through first; None for values


@dataclass(frozen=True, slots=True)
class ExpertSlots:
    """(token, expert, weight) triples: which tokens go to which experts, three [num_slots]."""

    tokens: Tensor  # int64
    experts: Tensor  # int64: logical ids when dispatched, rows of LayerExperts once localised
    weights: Tensor  # fp32

    @staticmethod
    def from_topk(topk_ids: Tensor, topk_weights: Tensor) -> ExpertSlots:
        """Return a slot for every choice of every token, in token order.

        Args:
            topk_ids: [num_tokens, k].
            topk_weights: [num_tokens, k].
        """
        num_tokens, top_k = topk_ids.shape
        tokens = torch.arange(num_tokens, device=topk_ids.device).repeat_interleave(top_k)
        return ExpertSlots(tokens, topk_ids.reshape(-1), topk_weights.reshape(-1).float())

    @staticmethod
    def from_table(slot_table: Tensor) -> ExpertSlots:
        """Unpack the slots of a frame.

        Args:
            slot_table: [3, num_slots] int32: tokens, experts, the bits of the fp32 weights.
        """
        tokens, experts, weights = slot_table
        return ExpertSlots(tokens.long(), experts.long(), weights.view(torch.float32))


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """The experts of one layer that a process owns, ascending by logical id."""

    gate_up: Weight  # [num_owned, 2 * intermediate, hidden], packed as a gated weight
    down: Weight  # [num_owned, hidden, intermediate]
    expert_to_group: Tensor  # [num_owned] int64: a position in the owner's list of groups
    num_groups: int

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        return self.gate_up.nbytes + self.down.nbytes


class PagedAttention(Protocol):
    """Attention straight from the blocks of a KV cache, without a scale."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor,
        *,
        block_tables: Tensor,
        requests: Tensor,
        positions: Tensor,
        window: int | None,
        key_formation: KeyFormation | None = None,
    ) -> Tensor:
        """Attend for every token of a batch.

        Args:
            query: [num_tokens, num_heads, head_dim]; a request's tokens are neighbours, in order.
            key: [num_blocks, block_size, num_kv_heads, head_dim]; None with `key_formation`.
            value: the same shape.
            block_tables: [num_requests, table_width] int64.
            requests: [num_tokens] int64, rows of `block_tables`.
            positions: [num_tokens] int64, in the request.
            window: how many positions a token sees, itself included; None for all.
            key_formation: how keys come from what `value` holds, where no keys are cached.

        Returns:
            [num_tokens, num_heads * head_dim].
        """
        ...


class Kernels(Protocol):
    """What a layer computes. x is [num_tokens, num_inputs], a weight [num_outputs, num_inputs]."""

    @property
    def name(self) -> str:
        """The kernels' name for an operator: "native" or "PyTorch"."""
        ...

    @property
    def attend(self) -> PagedAttention | None:
        """The paged attention that belongs to these kernels; None: engine.attention chooses one."""
        ...

    @property
    def reads_free_slots(self) -> bool:
        """True if attention reads, masked, KV slots of a block that hold no key yet."""
        ...

    def pack(self, weight: Tensor) -> Weight:
        """Lay out a weight, or a stack of them, for `linear`."""
        ...

    def pack_gated(self, weight: Tensor) -> Weight:
        """Lay out [2 * inner, num_inputs], gate first, or a stack of such, for `gated_mlp`."""
        ...

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """Return x @ weight^T + bias."""
        ...

    def gated_gelu(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return gelu_tanh(gate) * up, elementwise."""
        ...

    def gated_mlp(self, x: Tensor, gate_up: Weight, down: Weight) -> Tensor:
        """Return gated_gelu of the two halves of x @ gate_up^T, times down^T."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """Return x / rms(x) * weight along the last dimension, computed in fp32."""
        ...

    def add_norm(
        self, residual: Tensor, x: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None
    ) -> Tensor:
        """Return (residual + rms_norm(x)) * scale; scale [1]."""
        ...

    def norm_and_rotate(
        self,
        qkv: Tensor,
        num_queries: int,
        norm_weight: Tensor,
        eps: float,
        rotation: tuple[Tensor, Tensor],
        kv: KVWrite | None,
    ) -> Tensor:
        """Norm the heads, rotate queries and keys, and write keys and values to the KV cache.

        Args:
            qkv: [num_tokens, num_heads, head_dim]: queries, keys, values. Where values have no
                projection of their own, the keys are the last heads and serve as both.
            num_queries: query heads.
            norm_weight: [num_queries + num_keys, head_dim]; num_keys is 0 where no keys are cached.
            eps: of the norms.
            rotation: cos and sin [num_tokens, 1, head_dim], the first half of the sines negated.
            kv: where to write; None to write nothing.

        Returns:
            The queries [num_tokens, num_queries, head_dim].
        """
        ...

    def top_k_experts(
        self, scores: Tensor, k: int, per_expert_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Choose the k most probable experts of each token.

        Returns:
            Ids int64 and weights fp32, both [num_tokens, k]; the weights are the chosen experts'
            probabilities, made to add up to 1, times the expert's scale.
        """
        ...

    def expert_partials(
        self, hidden_states: Tensor, slots: ExpertSlots, experts: LayerExperts
    ) -> Tensor:
        """Return each group's sum of its weighted experts' outputs.

        The order is what makes answers independent of who gave them: within a group a token's
        weighted outputs are added in ascending expert id, in fp32, and the sum is rounded to the
        hidden dtype, so that a frame carries exactly what a local computation keeps.

        Args:
            hidden_states: [num_tokens, hidden].
            slots: localised, see ExpertSlots.
            experts: of the layer.

        Returns:
            [num_groups, num_tokens, hidden] in the dtype of the hidden states; exact zeros where a
            token has no slot in the group.
        """
        ...

    def expert_rows(
        self,
        hidden_states: Tensor,
        slot_table: Tensor,
        expert_to_row: Tensor,
        experts: LayerExperts,
    ) -> Tensor | None:
        """Return what an expert host answers: the (group, token) rows of `expert_partials` that
        have a slot, in order; None if an expert isn't owned.

        Args:
            hidden_states: [num_tokens, hidden].
            slot_table: [3, num_slots] int32 by logical ids, see ExpertSlots.from_table.
            expert_to_row: [num_experts] int64: the expert's row in `experts`, -1 if not owned.
            experts: of the layer.

        Returns:
            [num_rows, hidden].
        """
        ...
