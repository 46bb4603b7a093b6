"""Paged attention by the native CPU kernels: prefill and decode alike, straight from the blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.kernels.interface import KeyFormation, PagedAttention
from cluster.spec import AttentionKind
from engine.attention.interface import KVTensors
from engine.batch import Batch


class NativeAttention:
    """Implements engine.attention.Attention; a query's bits don't depend on the batch."""

    def __init__(
        self, attend: PagedAttention, batch: Batch, kind: AttentionKind, window: int | None
    ) -> None:
        self._attend, self._window = attend, window
        self._table = batch.block_tables[kind].contiguous()
        self._requests = torch.arange(batch.num_requests).repeat_interleave(
            torch.tensor(batch.query_lens)
        )
        self._positions = batch.positions
        self._num_positions = max(batch.seq_lens)

    def __call__(self, query: Tensor, kv: KVTensors) -> Tensor:
        formation = None
        if kv.shared_kv is not None:
            cos, sin = kv.shared_kv.rotary.table(self._num_positions)
            formation = KeyFormation(kv.shared_kv.weight, cos, sin, kv.shared_kv.eps)
        return self._attend(
            query.contiguous(),
            kv.key,
            kv.value,
            block_tables=self._table,
            requests=self._requests,
            positions=self._positions,
            window=self._window,
            key_formation=formation,
        )
