"""ModelRunner: owns the KV cache's tensors and runs a step's forward pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cluster.errors import NotEnoughMemory
from cluster.spec import AttentionKind, LayerSpec, ModelSpec
from engine.attention.interface import KVTensors
from engine.batch import Batch
from engine.cache.kv_cache import KVCacheConfig
from engine.model.decoder_layer import Experts, Forward
from engine.model.model import GemmaDecoder


class ModelRunner:
    """Computes batches with one decoder, in one or two micro-batches.

    With two micro-batches and remote experts, the requests of a step are divided into two halves
    that take turns: while one waits for its experts, the other computes.
    """

    def __init__(
        self,
        model: GemmaDecoder,
        kv: KVCacheConfig,
        experts: Experts | None,
        *,
        num_micro_batches: int = 1,
    ) -> None:
        """Allocate the KV cache.

        Args:
            model: The decoder.
            kv: Sizes of the KV cache.
            experts: Computes the experts of its layers; None: the model has none.
            num_micro_batches: 1 or 2.

        Raises:
            NotEnoughMemory: The KV cache doesn't fit on the model's device.
        """
        assert num_micro_batches in (1, 2)
        self.model, self.experts = model, experts
        self.num_micro_batches = num_micro_batches
        self.kv_pools = allocate_kv(model, kv)
        self.kv_tensors = by_layer(model, kv, self.kv_pools)

    @torch.inference_mode()
    def execute(self, batch: Batch) -> Tensor:
        """Compute the batch's tokens.

        Returns:
            Logits [num_logits, vocab_size] in fp32.

        Raises:
            Unavailable: Experts that it needs can't be reached. The KV cache then holds some of the
                batch's keys and values; computing the same batch again overwrites them.
        """
        if self.model.reads_free_slots:
            self._clear_opened(batch)
        batch = batch.to(self.model.device)
        parts = [batch]
        if self.num_micro_batches == 2 and self.experts is not None and self.experts.is_remote:
            parts = split(batch)
        passes = [self.model.forward(part, self.kv_tensors, self.experts) for part in parts]
        logits = _take_turns(passes)
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _clear_opened(self, batch: Batch) -> None:
        """Zero the blocks whose free slots attention will read.

        An earlier request may have left NaN there, which no mask removes: 0 times NaN is NaN.
        """
        for kind, pool in self.kv_pools.items():
            opened = opened_blocks(batch, kind, pool.shape[3])
            if len(opened):
                pool.index_fill_(2, opened.to(pool.device, non_blocking=True), 0)


def allocate_kv(model: GemmaDecoder, kv: KVCacheConfig) -> dict[AttentionKind, Tensor]:
    """Allocate the keys and values of all layers that own them, as a tensor of zeros per kind.

    Returns:
        By kind: [num_layers, 1 or 2, num_blocks, block_size, num_kv_heads, head_dim].

    Raises:
        NotEnoughMemory: They don't fit on the model's device.
    """
    pools = {}
    try:
        for kind in AttentionKind:
            if layers := _owners(model.spec, kind):
                num_rows = {1 if layer.has_shared_kv(kv.kv_layout) else 2 for layer in layers}
                slot_shapes = {(layer.num_kv_heads, layer.head_dim) for layer in layers}
                assert len(num_rows) == len(slot_shapes) == 1, "a kind has one geometry"
                blocks = (len(layers), num_rows.pop(), kv.num_blocks[kind], kv.block_size)
                pools[kind] = torch.zeros(
                    blocks + slot_shapes.pop(), dtype=model.dtype, device=model.device
                )
    except RuntimeError as error:  # torch's out-of-memory errors, on the CPU and on GPUs
        raise NotEnoughMemory(f"The KV cache doesn't fit on {model.device}: {error}") from error
    return pools


def by_layer(
    model: GemmaDecoder, kv: KVCacheConfig, pools: Mapping[AttentionKind, Tensor]
) -> dict[int, KVTensors]:
    """Return views of the pools: the tensors of each layer that owns some, by layer index."""
    tensors = {}
    for kind, pool in pools.items():
        for layer, rows in zip(_owners(model.spec, kind), pool, strict=True):
            key = rows[0] if len(rows) == 2 else None
            shared_kv = model.shared_kv(layer, kv.kv_layout)
            tensors[layer.layer_idx] = KVTensors(key, rows[-1], shared_kv)
    return tensors


def opened_blocks(batch: Batch, kind: AttentionKind, block_size: int) -> Tensor:
    """Return the last blocks of requests that this step is the first to write to: [num_opened]."""
    lens = zip(batch.query_lens, batch.seq_lens, strict=True)
    entries = [
        (row, (seq_len - 1) // block_size)
        for row, (query_len, seq_len) in enumerate(lens)
        if (seq_len - 1) % block_size < query_len
    ]
    rows, columns = torch.tensor(entries, dtype=torch.int64).view(-1, 2).unbind(1)
    return batch.block_tables[kind][rows, columns]


def _owners(spec: ModelSpec, kind: AttentionKind) -> list[LayerSpec]:
    return [layer for layer in spec.layers if layer.owns_kv and layer.kind is kind]


def split(batch: Batch) -> list[Batch]:
    """Divide a batch into two of whole requests with about half of the tokens each, if it can."""
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

    places = range(batch.num_requests)[requests]
    return replace(
        batch,
        input_ids=batch.input_ids[tokens],
        positions=batch.positions[tokens],
        query_lens=batch.query_lens[requests],
        seq_lens=batch.seq_lens[requests],
        block_tables=cut(batch.block_tables, requests),
        slot_mapping=cut(batch.slot_mapping, tokens),
        logits_indices=batch.logits_indices[logits] - offset,
        overlays=[
            replace(overlay, request=overlay.request - places[0], row=overlay.row - offset)
            for overlay in batch.overlays
            if overlay.request in places
        ],
    )


def _take_turns(passes: list[Forward]) -> list[Tensor]:
    """Run the passes in turn, each up to where it would wait; returns their results in order."""
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
