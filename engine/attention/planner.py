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
from engine.attention.one_row import OneRow
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
        """One step's attention of one kind. `is_reference`: by PyTorch's operations where there is
        a choice.
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
    one_row: Callable[[LayerSpec, KVLayout], OneRow | None],
) -> PlanAttention | None:
    """The Triton kernel, for global layers, where it is known to work."""
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
        where = device, dtype, spec.num_attention_heads
        if not triton_attention.works(*where, shape, one_row(layer, "values")):
            return None
    return triton_attention.TritonAttention
