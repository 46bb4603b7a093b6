"""The arithmetic of a layer, behind one interface: PyTorch's on any device, our own on a CPU.

TorchKernels is the reference. InvariantKernels keeps batch_invariant where it runs; NativeKernels
(cluster/kernels/native.py) keeps it by construction and is the fastest on a CPU. Model code is
written once against `Kernels` and doesn't know which it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.kernels import invariant


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in the native kernels' layout; a stack of them where there is one per expert.

    A gated weight is the gate's rows, then as many of the up projection.
    """

    panels: Tensor  # [..., num_panels, num_inputs, 32] fp32
    num_outputs: int  # of the product; of the gate alone where gated

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes


Weight: TypeAlias = Tensor | PackedWeight


class Kernels(Protocol):
    """Shapes: rows are tokens, x [num_rows, num_inputs]; weights [num_outputs, num_inputs]."""

    def pack(self, weight: Tensor) -> Weight:
        """A weight, or a stack of them, as `linear` wants it."""
        ...

    def pack_gated(self, weight: Tensor) -> Weight:
        """[2 * inner, num_inputs], gate rows first, or a stack of such, as `gated_mlp` wants it."""
        ...

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x @ weight^T + bias."""
        ...

    def gated_gelu(self, gate: Tensor, up: Tensor) -> Tensor:
        """gelu_tanh(gate) * up, elementwise."""
        ...

    def gated_mlp(self, x: Tensor, gate_up: Weight, down: Weight) -> Tensor:
        """gated_gelu of the two halves of x @ gate_up^T, times down^T."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """x / rms(x) * weight along the last dimension, in fp32 inside."""
        ...

    def add_norm(
        self, residual: Tensor, x: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None
    ) -> Tensor:
        """(residual + rms_norm(x)) * scale; scale [1]."""
        ...

    def norm_and_rotate(
        self,
        qkv: Tensor,
        num_queries: int,
        norm_weight: Tensor,
        eps: float,
        rotation: tuple[Tensor, Tensor],
        kv: tuple[Tensor, Tensor | None, Tensor] | None,
    ) -> Tensor:
        """Norm the heads of qkv [num_rows, num_heads, head_dim], rotate queries and keys, and write
        keys and values to the KV cache. Returns the queries [num_rows, num_queries, head_dim].

        norm_weight [num_queries + num_keys, head_dim]. `rotation` is cos and sin [num_rows, 1,
        head_dim], the first half of the sines negated. `kv` is slots [num_rows], and keys and
        values [num_slots, num_kv_heads, head_dim]; None where nothing is to be written. The values
        are the last heads, which are the keys where values have none of their own; with values
        alone to be written, num_keys is 0.
        """
        ...

    def top_k_experts(
        self, scores: Tensor, k: int, per_expert_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The k most probable experts of each row: ids int64 and weights fp32 [num_rows, k].

        Weights are probabilities, made to add up to 1, times the expert's scale.
        """
        ...


class TorchKernels:
    """Plain PyTorch: any device and dtype."""

    def pack(self, weight: Tensor) -> Weight:
        return weight

    def pack_gated(self, weight: Tensor) -> Weight:
        return weight

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        assert isinstance(weight, Tensor)
        return F.linear(x, weight, bias)

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
        kv: tuple[Tensor, Tensor | None, Tensor] | None,
    ) -> Tensor:
        heads = self.rms_norm(qkv, None, eps)
        rotated = rotate(heads[:, : len(norm_weight)] * norm_weight, *rotation)
        if kv is not None:
            slots, keys, values = kv
            if keys is not None:
                keys.index_copy_(0, slots, rotated[:, num_queries:])
            values.index_copy_(0, slots, heads[:, -values.shape[1] :])
        return rotated[:, :num_queries]

    def top_k_experts(
        self, scores: Tensor, k: int, per_expert_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32)
        weights, ids = torch.topk(probabilities, k)
        return ids, weights / weights.sum(-1, keepdim=True) * per_expert_scale[ids]


class InvariantKernels(TorchKernels):
    """PyTorch's, with products and activations whose bits don't depend on the batch."""

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        assert isinstance(weight, Tensor)
        return invariant.linear(x, weight, bias)

    def gated_gelu(self, gate: Tensor, up: Tensor) -> Tensor:
        return invariant.gated_gelu(gate, up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of x [num_tokens, num_heads, head_dim]."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    return (x * cos).add_(swapped.mul_(sin))
