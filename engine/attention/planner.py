"""Which code attends: the fastest for this device that keeps what is asked."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from cluster.kernels.interface import Kernels
from cluster.spec import AttentionKind, KVLayout, LayerSpec, ModelSpec
from engine.attention.interface import Attention
from engine.attention.invariant_attention import InvariantAttention
from engine.attention.native_attention import NativeAttention
from engine.attention.shared_kv import SharedKV
from engine.attention.torch_attention import FastAttention, SpanAttention
from engine.batch import Batch

PlanAttention = Callable[[Batch, AttentionKind, int | None, int], Attention]
logger = logging.getLogger(__name__)


class AttentionPlanner:
    """Plans the attention of each step with one of five implementations of Attention."""

    def __init__(
        self,
        kernels: Kernels,
        dtype: torch.dtype,
        *,
        batch_invariant: bool,
        gpu: PlanAttention | None = None,
    ) -> None:
        """Choose among the implementations.

        Args:
            kernels: of the model; their own paged attention comes first, where they have one.
            dtype: of the hidden states.
            batch_invariant: whether a query's bits mustn't depend on the batch.
            gpu: the attention of global layers on this GPU, as `find_gpu_attention` gives it.
        """
        self._kernels, self._dtype, self._batch_invariant = kernels, dtype, batch_invariant
        self._gpu = gpu

    def plan(
        self,
        batch: Batch,
        kind: AttentionKind,
        window: int | None,
        block_size: int,
        *,
        is_reference: bool = False,
    ) -> Attention:
        """Plan one step's attention of one kind.

        Args:
            batch: of the step.
            kind: of the layers.
            window: how many positions a token sees, itself included; None for all.
            block_size: of the KV cache.
            is_reference: whether to prefer PyTorch's operations where there is a choice.
        """
        causal = self._plan_causal(batch, kind, window, block_size, is_reference=is_reference)
        if window is None or not any(overlay.is_bidirectional for overlay in batch.overlays):
            return causal
        return SpanAttention(causal, batch, kind, window, block_size, self._dtype)

    def _plan_causal(
        self,
        batch: Batch,
        kind: AttentionKind,
        window: int | None,
        block_size: int,
        *,
        is_reference: bool,
    ) -> Attention:
        if self._kernels.attend is not None:
            return NativeAttention(self._kernels.attend, batch, kind, window)
        if self._batch_invariant:
            return InvariantAttention(batch, kind, window, block_size)
        if self._gpu is not None and kind is AttentionKind.GLOBAL and not is_reference:
            return self._gpu(batch, kind, window, block_size)
        return FastAttention(batch, kind, window, block_size, self._dtype)


def find_gpu_attention(
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    shared_kv: Callable[[LayerSpec, KVLayout], SharedKV | None],
) -> PlanAttention | None:
    """Return the Triton kernel for global layers; None where it isn't known to work."""
    if device.type != "cuda":
        return None
    try:
        from engine.attention import triton_attention  # Triton comes with torch's CUDA build alone
    except ImportError:
        logger.warning("Triton isn't installed, so PyTorch attends, more slowly.")
        return None
    layers = {
        (layer.num_kv_heads, layer.head_dim): layer
        for layer in spec.layers
        if layer.kind is AttentionKind.GLOBAL
    }
    for shape, layer in layers.items():
        works = triton_attention.works(
            device, dtype, spec.num_attention_heads, shape, shared_kv(layer, "values")
        )
        if not works:
            return None
    return triton_attention.TritonAttention
