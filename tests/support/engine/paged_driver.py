"""Drives a ModelRunner by hand: block tables, chunks and mixed batches, without a scheduler."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cluster.spec import AttentionKind, KVLayout, ModelSpec
from engine.batch import Batch
from engine.cache.kv_cache import KVCacheConfig
from engine.model.decoder_layer import Experts
from engine.model.model import GemmaDecoder
from engine.runner import ModelRunner
from engine.spans import MediaSpan, Overlay, overlays

BLOCK_SIZE = 4
POISON = math.nan  # in freed blocks: whatever is computed with one shows it


@dataclass
class Sequence:
    """One request: its tokens, how many are computed, and all logits so far."""

    token_ids: list[int]
    num_computed: int = 0
    tables: dict[AttentionKind, list[int]] = field(default_factory=dict)
    logits: dict[int, Tensor] = field(default_factory=dict)  # by position
    spans: list[MediaSpan] = field(default_factory=list)


class PagedDriver:
    """Hands out blocks in random order and takes them back as the window leaves them."""

    def __init__(
        self,
        model: GemmaDecoder,
        experts: Experts | None,
        *,
        num_blocks: int = 400,
        kv_layout: KVLayout = "values",
        **options: Any,
    ) -> None:
        self.spec: ModelSpec = model.spec
        blocks = dict.fromkeys(AttentionKind, num_blocks)
        config = KVCacheConfig(BLOCK_SIZE, blocks, kv_layout=kv_layout)
        self.runner = ModelRunner(model, config, experts, **options)
        self._free = {
            kind: random.Random(7).sample(range(1, num_blocks), num_blocks - 1)
            for kind in AttentionKind
        }

    def step(self, work: list[tuple[Sequence, int]], *, all_logits: bool = True) -> None:
        """Compute the next n tokens of each sequence; keeps all logits of them, or the last."""
        kept = iter(self.runner.execute(self.prepare(work, all_logits=all_logits)))
        for sequence, num_new in work:
            first = 0 if all_logits else num_new - 1
            for i in range(first, num_new):
                sequence.logits[sequence.num_computed + i] = next(kept).clone()
            sequence.num_computed += num_new
            self._leave_window(sequence)

    def prepare(self, work: list[tuple[Sequence, int]], *, all_logits: bool = False) -> Batch:
        """The batch of `step`, with its blocks allocated."""
        for sequence, num_new in work:
            self._allocate(sequence, sequence.num_computed + num_new)
        return _batch(work, all_logits)

    def generate(self, sequence: Sequence, num_tokens: int) -> None:
        """Greedy tokens, one step each; the last one is not computed."""
        for i in range(num_tokens):
            if i > 0:
                self.step([(sequence, 1)])
            sequence.token_ids.append(int(sequence.logits[sequence.num_computed - 1].argmax()))

    def release(self, sequence: Sequence) -> None:
        for kind, table in sequence.tables.items():
            self._drop(kind, [block for block in table if block])
        sequence.tables.clear()

    def _allocate(self, sequence: Sequence, num_tokens: int) -> None:
        for kind in AttentionKind:
            table = sequence.tables.setdefault(kind, [])
            while len(table) * BLOCK_SIZE < num_tokens:
                table.append(self._free[kind].pop())

    def _leave_window(self, sequence: Sequence) -> None:
        kind = AttentionKind.SLIDING
        unseen = max(0, sequence.num_computed - self.spec.sliding_window + 1) // BLOCK_SIZE
        table = sequence.tables[kind]
        self._drop(kind, [block for block in table[:unseen] if block])
        table[:unseen] = [0] * unseen

    def _drop(self, kind: AttentionKind, blocks: list[int]) -> None:
        self._free[kind] += blocks
        for idx, tensors in self.runner.kv_tensors.items():
            if self.spec.layers[idx].kind is kind:
                for tensor in tensors.stored:
                    tensor[blocks] = POISON


def _batch(work: list[tuple[Sequence, int]], all_logits: bool) -> Batch:
    input_ids, positions, logits_indices = list[int](), list[int](), list[int]()
    slots: dict[AttentionKind, list[int]] = {kind: [] for kind in AttentionKind}
    overlaid: list[Overlay] = []
    for i, (sequence, num_new) in enumerate(work):
        start, stop = sequence.num_computed, sequence.num_computed + num_new
        overlaid += overlays(sequence.spans, start, stop, request=i, row=len(input_ids))
        input_ids += sequence.token_ids[start:stop]
        assert len(sequence.token_ids) >= stop
        positions += range(start, stop)
        logits_indices += range(len(input_ids) - (num_new if all_logits else 1), len(input_ids))
        for kind, table in sequence.tables.items():
            slots[kind] += [
                table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(start, stop)
            ]
    width = max(len(table) for sequence, _ in work for table in sequence.tables.values())
    return Batch(
        input_ids=torch.tensor(input_ids),
        positions=torch.tensor(positions),
        query_lens=[num_new for _, num_new in work],
        seq_lens=[sequence.num_computed + num_new for sequence, num_new in work],
        block_tables={
            kind: torch.tensor([_padded(sequence.tables[kind], width) for sequence, _ in work])
            for kind in AttentionKind
        },
        slot_mapping={kind: torch.tensor(rows) for kind, rows in slots.items()},
        logits_indices=torch.tensor(logits_indices),
        overlays=overlaid,
    )


def _padded(table: list[int], width: int) -> list[int]:
    return table + [0] * (width - len(table))
