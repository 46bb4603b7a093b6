"""The parts of a Gemma 4 layer around attention: MLPs, the router, norms, products, embeddings.

Each reads its tensors through a LayerBuilder, by their checkpoint names, and computes with the
model's kernels. Equations as in transformers' Gemma 4 (models/gemma4/modeling_gemma4.py).
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.kernels.interface import Kernels
from cluster.spec import ModelSpec
from engine.model.weights import Weights


class MLP:
    """Gated MLP; gate and up are one GEMM."""

    def __init__(self, build: LayerBuilder, intermediate_size: int) -> None:
        size = build.spec.hidden_size
        self.kernels = build.kernels
        gate_up = build.matrix(
            [("gate_proj", intermediate_size), ("up_proj", intermediate_size)], size
        )
        self.gate_up_proj = self.kernels.pack_gated(gate_up)
        self.down_proj = self.kernels.pack(build.matrix([("down_proj", size)], intermediate_size))

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.gated_mlp(x, self.gate_up_proj, self.down_proj)


class Router:
    """Chooses top_k experts for each token (the model's gate, not the network's ExpertRouter)."""

    def __init__(self, build: LayerBuilder) -> None:
        spec = build.spec
        self.kernels, self.top_k = build.kernels, spec.top_k_experts
        scale = build.tensor("scale", spec.hidden_size) * spec.hidden_size**-0.5
        self.norm = RMSNorm(self.kernels, scale, spec.rms_norm_eps)
        self.proj = build.linear("proj", spec.hidden_size, spec.num_experts)
        self.per_expert_scale = build.tensor("per_expert_scale", spec.num_experts)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [num_tokens, hidden_size] -> topk_ids int64 and topk_weights fp32 [num_tokens, k]."""
        return self.kernels.top_k_experts(
            self.proj(self.norm(x)), self.top_k, self.per_expert_scale
        )


class PerLayerInputs:
    """A small embedding of each token for each layer, mixed with a projection of the usual one."""

    def __init__(self, build: LayerBuilder) -> None:
        spec = build.spec
        self.shape = (-1, spec.num_layers, spec.ple_size)
        width = spec.num_layers * spec.ple_size
        table = build.tensor("embed_tokens_per_layer.weight", spec.ple_vocab_size, width)
        self.embed_tokens_per_layer = Embedding(table, spec.ple_size)
        self.per_layer_model_projection = build.linear(
            "per_layer_model_projection", spec.hidden_size, width
        )
        self.projection_scale = spec.hidden_size**-0.5
        self.per_layer_projection_norm = build.norm("per_layer_projection_norm", spec.ple_size)

    def __call__(self, input_ids: Tensor, embeddings: Tensor) -> Tensor:
        """input_ids [num_tokens] -> [num_tokens, num_layers, ple_size]."""
        projected = self.per_layer_model_projection(embeddings) * self.projection_scale
        projected = self.per_layer_projection_norm(projected.view(self.shape))
        return (projected + self.embed_tokens_per_layer(input_ids).view(self.shape)) * 2**-0.5


class PerLayerResidual:
    """Adds a layer's per-layer input, gated by the hidden state."""

    def __init__(self, build: LayerBuilder) -> None:
        size, ple_size = build.spec.hidden_size, build.spec.ple_size
        self.kernels = build.kernels
        self.per_layer_input_gate = build.linear("per_layer_input_gate", size, ple_size)
        self.per_layer_projection = build.linear("per_layer_projection", ple_size, size)
        self.post_per_layer_input_norm = build.norm("post_per_layer_input_norm", size)

    def __call__(self, x: Tensor, per_layer_input: Tensor, scale: Tensor) -> Tensor:
        """(x + residual) * scale; per_layer_input [num_tokens, ple_size], scale [1]."""
        gated = self.kernels.gated_gelu(self.per_layer_input_gate(x), per_layer_input)
        return self.post_per_layer_input_norm.add(x, self.per_layer_projection(gated), scale)


class RMSNorm:
    """x / rms(x) * weight, in fp32 inside; the weight is plain, not 1 + weight as in Gemma 3."""

    __slots__ = ("eps", "kernels", "weight")

    def __init__(self, kernels: Kernels, weight: Tensor, eps: float) -> None:
        self.kernels, self.weight, self.eps = kernels, weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)

    def add(self, residual: Tensor, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """(residual + norm of x) * scale."""
        return self.kernels.add_norm(residual, x, self.weight, self.eps, scale)


class Linear:
    """x @ weight^T + bias."""

    __slots__ = ("bias", "kernels", "weight")

    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor | None) -> None:
        self.kernels, self.weight, self.bias = kernels, kernels.pack(weight), bias

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.linear(x, self.weight, self.bias)


class Embedding:
    """A table whose rows are scaled by sqrt(size), rounded to the table's dtype."""

    def __init__(self, weight: Tensor, size: int) -> None:
        self.weight = weight
        self.scale = torch.tensor(size**0.5, dtype=weight.dtype).item()

    def __call__(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self.weight) * self.scale


class LayerBuilder:
    """Makes the parts of a module from the tensors under its prefix."""

    def __init__(self, spec: ModelSpec, weights: Weights, prefix: str, kernels: Kernels) -> None:
        self.spec, self.kernels = spec, kernels
        self.gemm_weights: dict[torch.Size, Tensor] = {}  # one of each shape, to be checked
        self._weights, self._prefix = weights, prefix

    def under(self, prefix: str) -> LayerBuilder:
        child = copy.copy(self)
        child._prefix += prefix
        return child

    def tensor(self, name: str, *shape: int) -> Tensor:
        return self._weights.tensor(self._prefix + name, *shape)

    def norm(self, name: str, size: int) -> RMSNorm:
        weight = self.tensor(f"{name}.weight", size)
        return RMSNorm(self.kernels, weight, self.spec.rms_norm_eps)

    def linear(self, name: str, in_size: int, out_size: int, *, bias: bool = False) -> Linear:
        return self.fused([(name, out_size)], in_size, bias=bias)

    def fused(self, parts: list[tuple[str, int]], in_size: int, *, bias: bool = False) -> Linear:
        """Projections of the same input, as one: (name, number of outputs) each."""
        biases = [(f"{self._prefix}{name}.bias", size) for name, size in parts]
        return Linear(
            self.kernels,
            self.matrix(parts, in_size),
            self._weights.vectors(*biases) if bias else None,
        )

    def matrix(self, parts: list[tuple[str, int]], in_size: int) -> Tensor:
        """The weights of `parts`, one below the other."""
        named = [(f"{self._prefix}{name}.weight", size) for name, size in parts]
        weight = self._weights.rows(*named, columns=in_size)
        self.gemm_weights.setdefault(weight.shape, weight)
        return weight
