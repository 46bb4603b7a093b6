"""The Gemma 4 text decoder: dense and mixture-of-experts, every member of the family.

Equations as in transformers' Gemma 4 (models/gemma4/modeling_gemma4.py); tensors are read by their
checkpoint names where they are used. Tokens of all requests of a step lie one after the other in
one [num_tokens, hidden_size] tensor; attention alone knows which belong together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from cluster.checkpoint import Checkpoint
from cluster.invariant import check_invariance
from cluster.native import NativeKernels, kernels_for
from cluster.spec import AttentionKind, KVRows, LayerSpec, ModelSpec
from engine.attention import Attention, KVTensors
from engine.batch import Batch
from engine.invariant_attention import InvariantAttention, check_attention
from engine.layers import (
    MLP,
    Embedding,
    LayerBuilder,
    Linear,
    PerLayerInputs,
    PerLayerResidual,
    Router,
)
from engine.native_attention import NativeAttention
from engine.one_row import OneRow
from engine.rotary import Rotary
from engine.torch_attention import FastAttention, SpanAttention
from engine.weights import CheckpointWeights, Progress, Weights, decoder_bytes

PlanAttention = Callable[[Batch, AttentionKind, int | None, int], Attention]
logger = logging.getLogger(__name__)

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


class GemmaDecoder:
    """The decoder's weights and its forward pass; holds no state of any request."""

    def __init__(self, spec: ModelSpec, weights: Weights, *, batch_invariant: bool = False) -> None:
        """Take the tensors from `weights`.

        Raises ConfigError when this machine can't keep batch_invariant.
        """
        self.spec = spec
        prefix = spec.tensor_prefix
        embedding = weights.tensor(
            f"{prefix}embed_tokens.weight", spec.vocab_size, spec.hidden_size
        )
        self.batch_invariant = batch_invariant
        self.kernels = kernels_for(
            embedding.device, embedding.dtype, batch_invariant=batch_invariant
        )
        build = LayerBuilder(spec, weights, prefix, self.kernels)
        self.embed_tokens = Embedding(embedding, spec.hidden_size)
        self.per_layer_inputs = PerLayerInputs(build) if spec.ple_size else None
        self.layers = [
            DecoderLayer(build.under(f"layers.{layer.layer_idx}."), layer) for layer in spec.layers
        ]
        self.norm = build.norm("norm", spec.hidden_size)
        if not spec.tie_word_embeddings:
            embedding = weights.tensor("lm_head.weight", spec.vocab_size, spec.hidden_size)
        self.lm_head = Linear(self.kernels, embedding, None)
        where = embedding.device, embedding.dtype
        head_dims = {layer.kind: layer.head_dim for layer in spec.layers}
        self.rotary = {kind: Rotary(spec.rope[kind], n, *where) for kind, n in head_dims.items()}
        self.gpu_attention = self._find_gpu_attention()
        self._num_owning = sum(layer.owns_kv for layer in spec.layers)  # they come first
        if batch_invariant:
            check_invariance(self.kernels, [*build.gemm_weights.values(), embedding])
            for heads, head_dim in {(layer.num_kv_heads, layer.head_dim) for layer in spec.layers}:
                check_attention(
                    self.plan_attention,
                    *(spec.num_attention_heads, heads, head_dim),
                    *(embedding.dtype, embedding.device),
                )

    @classmethod
    def load(
        cls,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_invariant: bool = False,
        on_progress: Progress | None = None,
    ) -> GemmaDecoder:
        """Read everything but the experts.

        Raises CheckpointError, naming the tensor, for one that is missing or has a wrong shape.
        """
        total = decoder_bytes(spec, checkpoint, dtype)
        weights = CheckpointWeights(checkpoint, device, dtype, on_progress, total)
        return cls(spec, weights, batch_invariant=batch_invariant)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def forward(
        self, batch: Batch, kv: Mapping[int, KVTensors], experts: Experts | None
    ) -> Forward:
        """Logits [num_logits, vocab_size] in fp32, softcapped; keys and values go to `kv`.

        `kv` maps the index of each layer that owns keys and values to its tensors.
        """
        x, per_layer = self._embed(batch)
        step = Step(self, batch, kv, experts)
        logits_indices: Tensor | None = batch.logits_indices
        for idx, layer in enumerate(self.layers):
            if idx == self._num_owning and len(batch.logits_indices) < batch.num_tokens:
                # From here on nothing is written for later tokens, so only the rows whose logits
                # are asked for go on, if there are any.
                if len(batch.logits_indices) == 0:
                    break
                x = x[batch.logits_indices]
                per_layer = None if per_layer is None else per_layer[batch.logits_indices]
                step = Step(self, _narrow(batch), kv, experts)
                logits_indices = None
            x = yield from layer.forward(x, None if per_layer is None else per_layer[:, idx], step)
        if logits_indices is not None:
            x = x[logits_indices]
        logits = self.lm_head(self.norm(x)).float()
        cap = self.spec.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _embed(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """[num_tokens, hidden_size] and, of a model that has them, what each layer is given beside
        it, [num_tokens, num_layers, ple_size].
        """
        input_ids = batch.input_ids
        x = self.embed_tokens(input_ids)
        if batch.overlays:
            input_ids = input_ids.clone()
            for overlay in batch.overlays:
                x[overlay.rows] = overlay.embeddings
                input_ids[overlay.rows] = self.spec.pad_token_id
        return x, None if self.per_layer_inputs is None else self.per_layer_inputs(input_ids, x)

    def one_row(self, layer: LayerSpec, kv_rows: KVRows) -> OneRow | None:
        """How keys and values come from what a layer keeps; None where it keeps both."""
        if not layer.keeps_one_row(kv_rows):
            return None
        weight = self.layers[layer.layer_idx].self_attn.qk_norm[-1]
        eps = self.spec.rms_norm_eps if kv_rows == "raw" else None
        return OneRow(weight, self.rotary[layer.kind], eps)

    @property
    def reads_free_slots(self) -> bool:
        """Whether attention reads, masked, the slots of a block that hold no key yet."""
        return not isinstance(self.kernels, NativeKernels)

    def plan_attention(
        self,
        batch: Batch,
        kind: AttentionKind,
        window: int | None,
        block_size: int,
        *,
        is_reference: bool = False,
    ) -> Attention:
        """One step's attention of one kind, by the fastest code that keeps what is asked.

        `is_reference`: by PyTorch's operations where there is a choice.
        """
        causal = self._plan_causal(batch, kind, window, block_size, is_reference=is_reference)
        if window is None or not any(overlay.is_bidirectional for overlay in batch.overlays):
            return causal
        return SpanAttention(causal, batch, kind, window, block_size, self.dtype)

    def _plan_causal(
        self,
        batch: Batch,
        kind: AttentionKind,
        window: int | None,
        block_size: int,
        *,
        is_reference: bool,
    ) -> Attention:
        if isinstance(self.kernels, NativeKernels):
            return NativeAttention(self.kernels, batch, kind, window)
        if self.batch_invariant:
            return InvariantAttention(batch, kind, window, block_size)
        if self.gpu_attention is not None and kind is AttentionKind.GLOBAL and not is_reference:
            return self.gpu_attention(batch, kind, window, block_size)
        return FastAttention(batch, kind, window, block_size, self.dtype)

    def _find_gpu_attention(self) -> PlanAttention | None:
        """The Triton kernel, for global layers, where it is known to work."""
        if self.device.type != "cuda" or self.batch_invariant:
            return None
        try:
            from engine import triton_attention  # Triton comes with torch's CUDA build alone
        except ImportError:
            logger.warning("Triton isn't installed, so PyTorch attends, more slowly.")
            return None
        layers = {
            (la.num_kv_heads, la.head_dim): la
            for la in self.spec.layers
            if la.kind is AttentionKind.GLOBAL
        }
        for shape, layer in layers.items():
            where = self.device, self.dtype, self.spec.num_attention_heads
            if not triton_attention.works(*where, shape, self.one_row(layer, "v")):
                return None
        return triton_attention.TritonAttention


class Step:
    """What the layers of one forward pass share: rotations, planned attention, slots."""

    def __init__(
        self,
        model: GemmaDecoder,
        batch: Batch,
        kv: Mapping[int, KVTensors],
        experts: Experts | None,
    ) -> None:
        self.kv, self.experts = kv, experts
        self.slots = batch.slot_mapping
        self.rotations = {kind: rotary(batch.positions) for kind, rotary in model.rotary.items()}
        block_size = next(iter(kv.values())).value.shape[1]
        windows = {AttentionKind.GLOBAL: None, AttentionKind.SLIDING: model.spec.sliding_window}
        # Raw rows and split ones are the reference, bit-equal as long as the same code reads both.
        layers = [(model.spec.layers[idx], tensors) for idx, tensors in kv.items()]
        is_reference = any(layer.k_eq_v and not tensors.is_v for layer, tensors in layers)
        self.attention = {
            kind: model.plan_attention(
                batch, kind, windows[kind], block_size, is_reference=is_reference
            )
            for kind in model.rotary
        }


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
        written = (step.slots[layer.kind], *kv.by_slot()) if layer.owns_kv else None
        if written is not None and kv.is_raw:
            slots, _, rows = written
            rows.index_copy_(0, slots, heads[:, self.num_heads :])
            written = None
        query = self.kernels.norm_and_rotate(
            heads,
            self.num_heads,
            self.qk_norm if kv.key is not None else self.qk_norm[: self.num_heads],
            self.eps,
            step.rotations[layer.kind],
            written,
        )
        return self.o_proj(step.attention[layer.kind](query, kv))


def _narrow(batch: Batch) -> Batch:
    """The rows whose logits are asked for, each as a request with one query; nothing is written."""
    rows = batch.logits_indices.tolist()
    request_of = [i for i, length in enumerate(batch.query_lens) for _ in range(length)]
    requests = torch.tensor([request_of[row] for row in rows], device=batch.input_ids.device)
    positions = batch.positions[batch.logits_indices]
    return replace(
        batch,
        input_ids=batch.input_ids[batch.logits_indices],
        positions=positions,
        query_lens=[1] * len(rows),
        seq_lens=[position + 1 for position in positions.tolist()],
        block_tables={kind: table[requests] for kind, table in batch.block_tables.items()},
        slot_mapping={},
        logits_indices=torch.arange(len(rows), device=requests.device),
        overlays=(),  # a request's last token sees none behind it
    )
