"""Batch: the tensors of one step, built from the scheduler's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cluster.spec import AttentionKind
from engine.cache.kv_cache import KVCache
from engine.cache.kv_cache_group import cdiv
from engine.scheduling.scheduler_output import SchedulerOutput
from engine.spans import Overlay, overlays


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work: requests one after the other, in the scheduler's order.

    Built on the CPU; `to` moves it. A kind of which no layer owns keys and values is missing from
    `block_tables` and `slot_mapping`.
    """

    input_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    query_lens: list[int]  # per request, its tokens in this step
    seq_lens: list[int]  # per request, its tokens in the KV cache after this step
    # Entry i of a row holds positions [i * block_size, (i + 1) * block_size); 0 is the null block,
    # before the window and past the end.
    block_tables: Mapping[AttentionKind, Tensor]  # [num_requests, max_blocks] int64
    slot_mapping: Mapping[AttentionKind, Tensor]  # [num_tokens] int64, block * block_size + offset
    logits_indices: Tensor  # [num_logits] int64, the last row of each request that samples
    overlays: Sequence[Overlay] = ()  # embeddings in place of tokens

    @property
    def num_tokens(self) -> int:
        """Rows of the batch."""
        return int(self.input_ids.shape[0])

    @property
    def num_requests(self) -> int:
        """Requests of the batch."""
        return len(self.query_lens)

    def to(self, device: torch.device | str) -> Batch:
        """Copy all tensors to a device, without waiting for it."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            block_tables={k: t.to(device, non_blocking=True) for k, t in self.block_tables.items()},
            slot_mapping={k: t.to(device, non_blocking=True) for k, t in self.slot_mapping.items()},
            logits_indices=self.logits_indices.to(device, non_blocking=True),
            overlays=[overlay.to(device) for overlay in self.overlays],
        )


def build_batch(output: SchedulerOutput, kv: KVCache) -> Batch:
    """Lay out the scheduled tokens, whose blocks are in the requests' block tables already."""
    scheduled = output.scheduled
    starts = np.array([s.request.num_computed_tokens for s in scheduled], dtype=np.int64)
    query_lens = np.array([s.num_new_tokens for s in scheduled], dtype=np.int64)
    rows = np.array([kv.row(s.request) for s in scheduled], dtype=np.int64)
    seq_lens = starts + query_lens
    ends = np.cumsum(query_lens)  # [num_requests], one past each request's last batch row

    positions = np.arange(ends[-1]) + np.repeat(starts - (ends - query_lens), query_lens)
    input_ids: list[int] = []
    overlaid: list[Overlay] = []
    parts = zip(starts.tolist(), seq_lens.tolist(), scheduled, strict=True)
    for i, (start, stop, item) in enumerate(parts):
        overlaid += overlays(item.request.spans, start, stop, request=i, row=len(input_ids))
        input_ids += item.request.token_ids(start, stop)

    block_idx, offset = np.divmod(positions, kv.block_size)
    token_rows = np.repeat(rows, query_lens)
    max_blocks = cdiv(int(seq_lens.max()), kv.block_size)
    samples = np.array([s.samples for s in scheduled])
    return Batch(
        input_ids=torch.tensor(input_ids, dtype=torch.int64),
        positions=torch.from_numpy(positions),
        query_lens=query_lens.tolist(),
        seq_lens=seq_lens.tolist(),
        block_tables={
            kind: torch.from_numpy(group.block_tables[rows, :max_blocks])
            for kind, group in kv.groups.items()
        },
        slot_mapping={
            kind: torch.from_numpy(
                group.block_tables[token_rows, block_idx] * kv.block_size + offset
            )
            for kind, group in kv.groups.items()
        },
        logits_indices=torch.from_numpy(ends[samples] - 1),
        overlays=overlaid,
    )
