"""A KV cache without numbers: each slot stands for a position and all tokens up to it."""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster.spec import AttentionKind
from engine.batch import Batch
from engine.cache.kv_cache import KVCache
from engine.cache.kv_cache_group import IntArray
from engine.request import Request
from tests.support.engine.schedulers import SHARING


class FakeKV:
    """Remembers what each slot stands for, and checks that every key a query reads is right.

    A key stands for its position and for all tokens up to it, of tenants that share or of one.
    """

    def __init__(self, kv: KVCache) -> None:
        self.kv = kv
        self.slots = {
            kind: np.full((group.pool.num_blocks, kv.block_size), -1)
            for kind, group in kv.groups.items()
        }

    def write_and_check(self, batch: Batch, requests: list[Request], broken: set[Request]) -> None:
        """Garbage is written for the `broken`, whose results nobody looks at."""
        meanings = [meanings_of(request) for request in requests]
        parts = zip(requests, meanings, batch.query_lens, batch.seq_lens, strict=True)
        written = np.concatenate(
            [np.where(r in broken, -2, m[end - num : end]) for r, m, num, end in parts]
        )
        for kind, slots in self.slots.items():
            mapping = batch.slot_mapping[kind].numpy()
            assert len(set(mapping.tolist())) == batch.num_tokens, "two tokens share a slot"
            assert mapping.min() >= self.kv.block_size, "the null block is written"
            slots.reshape(-1)[mapping] = written
        for kind, slots in self.slots.items():
            for row, request in enumerate(requests):
                if request in broken:
                    continue
                window, seq_len = self.kv.groups[kind].window, batch.seq_lens[row]
                first = seq_len - batch.query_lens[row]  # the query that reads farthest back
                positions = np.arange(0 if window is None else max(0, first - window + 1), seq_len)
                blocks = batch.block_tables[kind][row].numpy()[positions // self.kv.block_size]
                read = slots[blocks, positions % self.kv.block_size]
                assert (read == meanings[row][positions]).all(), "wrong keys are read"

    def read(self, kind: AttentionKind, block_id: int) -> Any:
        return self.slots[kind][block_id].copy()

    def write(self, kind: AttentionKind, block_id: int, value: Any) -> None:
        self.slots[kind][block_id] = value


def meanings_of(request: Request) -> IntArray:
    meaning = hash("both" if request.tenant in SHARING else request.tenant)
    meanings = []
    for position, token in enumerate(request.token_ids(0, request.num_tokens)):
        meaning = hash((meaning, position, token))
        meanings.append(meaning)
    return np.array(meanings)
