"""Owns the KV cache's tensors and runs one step's forward pass, in one or two micro-batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cluster.errors import NotEnoughMemory
from cluster.spec import AttentionKind
from engine.attention import KVTensors
from engine.batch import Batch
from engine.kv_cache import KVCacheConfig
from engine.model import Experts, Forward, GemmaDecoder


class ModelRunner:
    """Computes batches with one decoder.

    With two micro-batches and remote experts, the requests of a step are dealt into two halves
    that take turns: while one waits for its experts the other computes.
    """

    def __init__(
        self,
        model: GemmaDecoder,
        kv: KVCacheConfig,
        experts: Experts | None,
        *,
        num_micro_batches: int = 1,
    ) -> None:
        """Raises NotEnoughMemory when the KV cache doesn't fit on the model's device."""
        assert num_micro_batches in (1, 2)
        self.model, self.experts = model, experts
        self.num_micro_batches = num_micro_batches
        self.kv_tensors = allocate_kv(model, kv)

    @torch.inference_mode()
    def execute(self, batch: Batch) -> Tensor:
        """Compute the batch's tokens; returns logits [num_logits, vocab_size] in fp32.

        Raises Unavailable when experts that it needs can't be reached. The KV cache then holds some
        of the batch's keys and values; computing the same batch again overwrites them.
        """
        batch = batch.to(self.model.device)
        parts = [batch]
        if self.num_micro_batches == 2 and self.experts is not None and self.experts.is_remote:
            parts = split(batch)
        passes = [self.model.forward(part, self.kv_tensors, self.experts) for part in parts]
        logits = _take_turns(passes)
        return logits[0] if len(logits) == 1 else torch.cat(logits)


def allocate_kv(model: GemmaDecoder, kv: KVCacheConfig) -> dict[int, KVTensors]:
    """The tensors of each layer that owns keys and values, by layer index.

    Zeros, because attention reads masked slots too and nothing times NaN is NaN.
    """
    tensors = {}
    try:
        for layer in model.spec.layers:
            if layer.owns_kv:
                num_blocks = kv.num_blocks[layer.kind]
                shape = (num_blocks, kv.block_size, layer.num_kv_heads, layer.head_dim)
                value = torch.zeros(shape, dtype=model.dtype, device=model.device)
                one_row = model.one_row(layer, kv.kv_rows)
                key = torch.zeros_like(value) if one_row is None else None
                tensors[layer.layer_idx] = KVTensors(key, value, one_row)
    except RuntimeError as error:  # torch's out-of-memory errors, on the CPU and on GPUs
        raise NotEnoughMemory(f"The KV cache doesn't fit on {model.device}: {error}") from error
    return tensors


def split(batch: Batch) -> list[Batch]:
    """Two batches with about half of the tokens each, whole requests in each; or the one."""
    if batch.num_requests < 2:
        return [batch]
    ends = torch.tensor(batch.query_lens).cumsum(0)
    cut = int((2 * ends - batch.num_tokens).abs()[:-1].argmin()) + 1  # requests in the first half
    num_tokens = int(ends[cut - 1])
    num_logits = int((batch.logits_indices < num_tokens).sum())
    return [
        _slice(batch, slice(None, cut), slice(None, num_tokens), slice(None, num_logits), 0),
        _slice(
            batch, slice(cut, None), slice(num_tokens, None), slice(num_logits, None), num_tokens
        ),
    ]


def _slice(batch: Batch, requests: slice, tokens: slice, logits: slice, offset: int) -> Batch:
    def cut(tables: Mapping[AttentionKind, Tensor], rows: slice) -> dict[AttentionKind, Tensor]:
        return {kind: table[rows] for kind, table in tables.items()}

    return replace(
        batch,
        input_ids=batch.input_ids[tokens],
        positions=batch.positions[tokens],
        query_lens=batch.query_lens[requests],
        seq_lens=batch.seq_lens[requests],
        block_tables=cut(batch.block_tables, requests),
        slot_mapping=cut(batch.slot_mapping, tokens),
        logits_indices=batch.logits_indices[logits] - offset,
    )


def _take_turns(passes: list[Forward]) -> list[Tensor]:
    """Run the passes in turn, each up to where it would wait; their results, in order."""
    results: dict[int, Tensor] = {}
    waiting = deque(enumerate(passes))
    try:
        while waiting:
            index, forward = waiting.popleft()
            try:
                next(forward)
                waiting.append((index, forward))
            except StopIteration as done:
                results[index] = done.value
    finally:
        for forward in passes:
            forward.close()
    return [results[index] for index in range(len(passes))]
