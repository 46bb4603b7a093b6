"""The Gemma 4 text decoder: dense and mixture-of-experts, every member of the family.

Equations as in transformers' Gemma 4 (models/gemma4/modeling_gemma4.py); tensors are read by their
checkpoint names where they are used. Tokens of all requests of a step lie one after the other in
one [num_tokens, hidden_size] tensor; attention alone knows which belong together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cluster.checkpoint import Checkpoint
from cluster.kernels.check import check_invariance
from cluster.kernels.choose import kernels_for
from cluster.spec import AttentionKind, KVLayout, LayerSpec, ModelSpec
from engine.attention.interface import KVTensors
from engine.attention.invariant_attention import check_attention
from engine.attention.planner import AttentionPlanner, find_gpu_attention
from engine.attention.rotary import Rotary
from engine.attention.shared_kv import SharedKV
from engine.batch import Batch
from engine.model.decoder_layer import DecoderLayer, Experts, Forward, Step
from engine.model.layers import Embedding, LayerBuilder, Linear, PerLayerInputs
from engine.model.weights import CheckpointWeights, Progress, Weights, decoder_bytes


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
        head_dims = {layer.kind: layer.head_dim for layer in spec.layers}
        self.rotary = {
            kind: Rotary(spec.rope[kind], head_dim, embedding.device, embedding.dtype)
            for kind, head_dim in head_dims.items()
        }
        gpu = None
        if not batch_invariant:
            gpu = find_gpu_attention(spec, embedding.device, embedding.dtype, self.shared_kv)
        self.attention = AttentionPlanner(
            self.kernels, self.dtype, batch_invariant=batch_invariant, gpu=gpu
        )
        self._num_owning = sum(layer.owns_kv for layer in spec.layers)  # they come first
        if batch_invariant:
            check_invariance(self.kernels, [*build.gemm_weights.values(), embedding])
            shapes = {(layer.num_kv_heads, layer.head_dim) for layer in spec.layers}
            for num_kv_heads, head_dim in shapes:
                check_attention(
                    self.attention.plan,
                    num_heads=spec.num_attention_heads,
                    num_kv_heads=num_kv_heads,
                    head_dim=head_dim,
                    dtype=embedding.dtype,
                    device=embedding.device,
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
        """Compute logits [num_logits, vocab_size] in fp32, softcapped; writes to `kv`.

        `kv` maps the index of each layer that owns keys and values to its tensors.
        """
        x, per_layer = self._embed(batch)
        step = self._plan(batch, kv, experts)
        logits_indices: Tensor | None = batch.logits_indices
        for idx, layer in enumerate(self.layers):
            if idx == self._num_owning and len(batch.logits_indices) < batch.num_tokens:
                # From here on nothing is written for later tokens, so only the rows whose logits
                # are asked for go on, if there are any.
                if len(batch.logits_indices) == 0:
                    break
                x = x[batch.logits_indices]
                per_layer = None if per_layer is None else per_layer[batch.logits_indices]
                step = self._plan(_narrow(batch), kv, experts)
                logits_indices = None
            x = yield from layer.forward(x, None if per_layer is None else per_layer[:, idx], step)
        if logits_indices is not None:
            x = x[logits_indices]
        logits = self.lm_head(self.norm(x)).float()
        cap = self.spec.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def shared_kv(self, layer: LayerSpec, kv_layout: KVLayout) -> SharedKV | None:
        """Return how a layer's keys and values are formed; None where it caches both."""
        if not layer.has_shared_kv(kv_layout):
            return None
        weight = self.layers[layer.layer_idx].self_attn.qk_norm[-1]
        eps = self.spec.rms_norm_eps if kv_layout == "projection" else None
        return SharedKV(weight, self.rotary[layer.kind], eps)

    @property
    def reads_free_slots(self) -> bool:
        """True if attention reads, masked, KV slots of a block that hold no key yet."""
        return self.kernels.reads_free_slots

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

    def _plan(self, batch: Batch, kv: Mapping[int, KVTensors], experts: Experts | None) -> Step:
        """What is worked out once for all layers."""
        block_size = next(iter(kv.values())).value.shape[1]
        windows = {AttentionKind.GLOBAL: None, AttentionKind.SLIDING: self.spec.sliding_window}
        # Raw and separate layouts are the reference, bit-equal as long as the same code reads both.
        layers = [(self.spec.layers[idx], tensors) for idx, tensors in kv.items()]
        is_reference = any(
            layer.k_eq_v and not tensors.holds_values_alone for layer, tensors in layers
        )
        return Step(
            kv,
            experts,
            kv_slots=batch.slot_mapping,
            rotations={kind: rotary(batch.positions) for kind, rotary in self.rotary.items()},
            attention={
                kind: self.attention.plan(
                    batch, kind, windows[kind], block_size, is_reference=is_reference
                )
                for kind in self.rotary
            },
        )


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
