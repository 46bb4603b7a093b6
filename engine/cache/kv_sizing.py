"""KV cache sizing: bytes per block, what one request needs, and shares of the memory."""

from __future__ import annotations

from bisect import bisect_right

import torch

from cluster.errors import NotEnoughMemory
from cluster.spec import AttentionKind, KVLayout, ModelSpec
from engine.cache.kv_cache import KVCacheConfig
from engine.cache.kv_cache_group import cdiv, sliding_blocks

# With prefix caching, shares of the bytes that the first request leaves: at most so much for the
# windows of other running requests, and so much for those of checkpoints. The global group gets
# the rest.
RUNNING_SHARE, CHECKPOINT_SHARE = 0.5, 0.25


def kv_bytes_per_block(
    spec: ModelSpec,
    kind: AttentionKind,
    block_size: int,
    dtype: torch.dtype,
    kv_layout: KVLayout = "values",
) -> int:
    """Return the bytes of one block in all layers of `kind` that own keys and values.

    Args:
        spec: The model's geometry.
        kind: The KV cache group.
        block_size: Positions of a block; 1: bytes per token.
        dtype: Of keys and values.
        kv_layout: What is stored of a token (decision 9).
    """
    elements = sum(
        block_size * layer.kv_elements(kv_layout)
        for layer in spec.layers
        if layer.kind is kind and layer.owns_kv
    )
    return elements * dtype.itemsize


def min_kv_bytes(
    spec: ModelSpec,
    max_model_len: int,
    *,
    dtype: torch.dtype,
    block_size: int = 16,
    max_num_batched_tokens: int = 512,
    kv_layout: KVLayout = "values",
) -> int:
    """Return the bytes of a KV cache for one request of `max_model_len` tokens, null blocks too."""
    num_global = 1 + cdiv(max_model_len, block_size)
    per_step, per_seq = _sliding_needs(spec, max_model_len, block_size, max_num_batched_tokens)
    per_block = {
        k: kv_bytes_per_block(spec, k, block_size, dtype, kv_layout) for k in AttentionKind
    }
    sliding_bytes = (per_step + per_seq) * per_block[AttentionKind.SLIDING]
    return num_global * per_block[AttentionKind.GLOBAL] + sliding_bytes


def longest_context(
    spec: ModelSpec,
    kv_bytes: int,
    *,
    dtype: torch.dtype,
    block_size: int = 16,
    max_num_batched_tokens: int = 512,
    kv_layout: KVLayout = "values",
) -> int:
    """Return the most tokens that one request can have in `kv_bytes`.

    It is at most the model's context, and at least 1, whether that fits or not.
    """

    def needed(max_model_len: int) -> int:
        return min_kv_bytes(
            spec,
            max_model_len,
            dtype=dtype,
            block_size=block_size,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_layout=kv_layout,
        )

    lengths = range(1, spec.max_position_embeddings + 1)
    return max(1, bisect_right(lengths, kv_bytes, key=needed))


def size_kv_cache(
    spec: ModelSpec,
    kv_bytes: int,
    max_model_len: int,
    *,
    dtype: torch.dtype,
    block_size: int = 16,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 512,
    prefix_caching: bool = True,
    kv_layout: KVLayout = "values",
) -> KVCacheConfig:
    """Divide memory between the groups.

    The sliding group gets what max_num_seqs requests can use at once (fewer if memory is short),
    the global group all the rest, and at least what one request of max_model_len tokens needs.

    With prefix caching the sliding group also gets room for the windows of checkpoints. Each is as
    large as a running request's, so that without it a busy engine would evict them all, and nothing
    could resume. Idle room holds such windows too; running requests evict them when they need it.

    Args:
        spec: The model's geometry.
        kv_bytes: Bytes for both groups.
        max_model_len: Tokens of the longest request.
        dtype: Of keys and values.
        block_size: Positions of a block.
        max_num_seqs: Requests of one step.
        max_num_batched_tokens: Tokens of one step.
        prefix_caching: True if prefixes are cached.
        kv_layout: What is stored of a token (decision 9).

    Raises:
        NotEnoughMemory: Not even one request of max_model_len tokens fits.
    """
    per_block = {
        k: kv_bytes_per_block(spec, k, block_size, dtype, kv_layout) for k in AttentionKind
    }
    global_bytes, sliding_bytes = per_block[AttentionKind.GLOBAL], per_block[AttentionKind.SLIDING]
    min_global = 1 + cdiv(max_model_len, block_size)
    per_step, per_seq = _sliding_needs(spec, max_model_len, block_size, max_num_batched_tokens)
    needed = min_global * global_bytes + (per_step + per_seq) * sliding_bytes
    spare = kv_bytes - needed
    if spare < 0:
        raise NotEnoughMemory(
            f"The KV cache of one request of {max_model_len} tokens takes {needed / 1e6:.1f} MB; "
            f"{kv_bytes / 1e6:.1f} MB are free. Lower engine.max_model_len or raise "
            "engine.kv_bytes."
        )
    num_sliding = num_global = 0
    if sliding_bytes:
        for_windows = int(spare * RUNNING_SHARE) if prefix_caching else spare
        num_others = min(max_num_seqs - 1, for_windows // (per_seq * sliding_bytes))
        num_pinned = int(spare * CHECKPOINT_SHARE) // sliding_bytes if prefix_caching else 0
        num_sliding = per_step + (1 + num_others) * per_seq + num_pinned
    if global_bytes:
        num_global = (kv_bytes - num_sliding * sliding_bytes) // global_bytes
        if not prefix_caching:  # more than every request at full length could never be used
            num_global = min(num_global, 1 + max_num_seqs * (min_global - 1))
    return KVCacheConfig(
        block_size,
        {AttentionKind.GLOBAL: num_global, AttentionKind.SLIDING: num_sliding},
        per_block,
        kv_layout,
    )


def _sliding_needs(
    spec: ModelSpec, max_model_len: int, block_size: int, max_num_batched_tokens: int
) -> tuple[int, int]:
    """Return the sliding blocks for a step's tokens, and those for each request.

    Windows move on after each step, and a step computes max_num_batched_tokens in all: so a window
    (and a block's edge) per request, and the step's tokens once.
    """
    per_step = 1 + cdiv(min(max_num_batched_tokens, max_model_len), block_size)
    return per_step, 1 + sliding_blocks(spec.sliding_window, 1, block_size, max_model_len)
