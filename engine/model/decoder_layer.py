"""A Gemma 4 decoder layer: attention, the dense MLP, and the experts that it calls.

Equations as in transformers' Gemma 4 (models/gemma4/modeling_gemma4.py); tensors are read by their
checkpoint names where they are used.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cluster.kernels.interface import KVWrite
from cluster.spec import AttentionKind, LayerSpec
from engine.attention.interface import Attention, KVTensors
from engine.model.layers import MLP, LayerBuilder, PerLayerResidual, Router

# Runs to its end unless the experts are remote: then it yields whenever it is about to wait.
Forward = Generator[None, None, Tensor]


class Experts(Protocol):
    """The experts of every layer, in this process or in others."""

    @property
    def is_remote(self) -> bool:
        """False: `combine` never waits, so the forward pass never yields."""
        ...

    def dispatch(
        self, layer_idx: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Any:
        """Start computing; returns a handle for `combine`.

        hidden_states [num_tokens, hidden_size], topk_ids [num_tokens, top_k] int64,
        topk_weights [num_tokens, top_k] fp32.
        """
        ...

    def combine(self, handle: Any) -> Tensor:
        """The weighted sum of the experts' outputs, [num_tokens, hidden_size].

        Raises Unavailable when no copy of a needed expert can answer.
        """
        ...

    def abandon(self, handle: Any) -> None:
        """Give up a dispatched call that nobody will combine."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """What the layers of one forward pass share."""

    kv: Mapping[int, KVTensors]  # by layer index
    experts: Experts | None
    kv_slots: Mapping[AttentionKind, Tensor]  # where this step writes
    rotations: Mapping[AttentionKind, tuple[Tensor, Tensor]]  # cos and sin
    attention: Mapping[AttentionKind, Attention]  # planned


class DecoderLayer:
    """Attention, then the dense MLP with, in a mixture of experts, the routed experts beside it."""

    def __init__(self, build: LayerBuilder, layer: LayerSpec) -> None:
        spec = build.spec
        size = spec.hidden_size
        self.spec = layer
        self.self_attn = SelfAttention(build.under("self_attn."), layer)
        self.mlp = MLP(build.under("mlp."), layer.intermediate_size)
        self.input_layernorm = build.norm("input_layernorm", size)
        self.post_attention_layernorm = build.norm("post_attention_layernorm", size)
        self.pre_feedforward_layernorm = build.norm("pre_feedforward_layernorm", size)
        self.post_feedforward_layernorm = build.norm("post_feedforward_layernorm", size)
        self.layer_scalar = build.tensor("layer_scalar", 1)
        self.router: Router | None = None
        if spec.is_moe:
            self.router = Router(build.under("router."))
            self.pre_feedforward_layernorm_2 = build.norm("pre_feedforward_layernorm_2", size)
            self.post_feedforward_layernorm_1 = build.norm("post_feedforward_layernorm_1", size)
            self.post_feedforward_layernorm_2 = build.norm("post_feedforward_layernorm_2", size)
        self.per_layer_residual = PerLayerResidual(build) if spec.ple_size else None

    def forward(self, x: Tensor, per_layer_input: Tensor | None, step: Step) -> Forward:
        """x [num_tokens, hidden_size] -> the same; per_layer_input [num_tokens, ple_size]."""
        attended = self.self_attn(self.input_layernorm(x), step)
        x = self.post_attention_layernorm.add(x, attended)
        if self.router is None:
            mixed = self.mlp(self.pre_feedforward_layernorm(x))
        else:
            mixed = yield from self._mixture(self.router, x, step.experts)
        if self.per_layer_residual is None:
            return self.post_feedforward_layernorm.add(x, mixed, self.layer_scalar)
        x = self.post_feedforward_layernorm.add(x, mixed)
        assert per_layer_input is not None
        return self.per_layer_residual(x, per_layer_input, self.layer_scalar)

    def _mixture(self, router: Router, x: Tensor, experts: Experts | None) -> Forward:
        """Dense MLP plus routed experts. Both, and the router, read the raw residual, so the dense
        MLP is computed while the experts' answers are on their way."""
        assert experts is not None, "a mixture of experts needs experts"
        topk_ids, topk_weights = router(x)
        handle = experts.dispatch(
            self.spec.layer_idx, self.pre_feedforward_layernorm_2(x), topk_ids, topk_weights
        )
        try:
            dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(x)))
            if experts.is_remote:
                yield
        except BaseException:  # the step failed, here or in the other micro-batch
            experts.abandon(handle)
            raise
        return self.post_feedforward_layernorm_2.add(dense, experts.combine(handle))


class SelfAttention:
    """Queries, keys and values, normed and rotated; one GEMM makes all three."""

    def __init__(self, build: LayerBuilder, layer: LayerSpec) -> None:
        spec = build.spec
        self.layer, self.kernels, self.eps = layer, build.kernels, spec.rms_norm_eps
        self.num_heads = spec.num_attention_heads
        q_size, kv_size = self.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        parts = [("q_proj", q_size)]
        if layer.owns_kv:
            parts.append(("k_proj", kv_size))
            if not layer.k_eq_v:
                parts.append(("v_proj", kv_size))
        self.qkv_proj = build.fused(parts, spec.hidden_size, bias=spec.attention_bias)
        self.o_proj = build.linear("o_proj", q_size, spec.hidden_size, bias=spec.attention_bias)
        norms = [build.tensor("q_norm.weight", layer.head_dim).expand(self.num_heads, -1)]
        if layer.owns_kv:
            norms.append(
                build.tensor("k_norm.weight", layer.head_dim).expand(layer.num_kv_heads, -1)
            )
        self.qk_norm = torch.cat(norms)  # [num_heads + num_kv_heads, head_dim]

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        layer = self.layer
        kv = step.kv[layer.kv_layer_idx]
        heads = self.qkv_proj(x).view(x.shape[0], -1, layer.head_dim)
        write: KVWrite | None = None
        if layer.owns_kv:
            keys, values = kv.by_slot()
            write = KVWrite(step.kv_slots[layer.kind], keys, values)
            if kv.is_raw:
                values.index_copy_(0, write.kv_slots, heads[:, self.num_heads :])
                write = None
        query = self.kernels.norm_and_rotate(
            heads,
            self.num_heads,
            self.qk_norm if kv.key is not None else self.qk_norm[: self.num_heads],
            self.eps,
            step.rotations[layer.kind],
            write,
        )
        return self.o_proj(step.attention[layer.kind](query, kv))
