"""Paged attention by the native CPU kernels: prefill and decode alike, straight from the blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.kernels.native import NativeKernels
from cluster.spec import AttentionKind
from engine.attention.interface import KVTensors
from engine.batch import Batch


class NativeAttention:
    """Implements engine.attention.Attention; a query's bits don't depend on the batch."""

    def __init__(
        self, kernels: NativeKernels, batch: Batch, kind: AttentionKind, window: int | None
    ) -> None:
        self._kernels, self._window = kernels, window
        self._table = batch.block_tables[kind].contiguous()
        self._requests = torch.arange(batch.num_requests).repeat_interleave(
            torch.tensor(batch.query_lens)
        )
        self._positions = batch.positions
        self._num_positions = max(batch.seq_lens)

    def __call__(self, query: Tensor, kv: KVTensors) -> Tensor:
        one_row = None
        if kv.one_row is not None:
            cos, sin = kv.one_row.rotary.table(self._num_positions)
            one_row = kv.one_row.weight, cos, sin, kv.one_row.eps
        return self._kernels.attend(
            query.contiguous(),
            kv.key,
            kv.value,
            self._table,
            self._requests,
            self._positions,
            self._window,
            one_row,
        )
