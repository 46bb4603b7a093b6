"""The block pool, the sizes of the two groups, and the blocks that a window leaves behind."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import NotEnoughMemory
from cluster.spec import AttentionKind, KVLayout, ModelSpec
from engine.cache.block_pool import NULL_BLOCK, BlockPool
from engine.cache.kv_cache import KVCache, KVCacheConfig
from engine.cache.kv_sizing import (
    KEPT_SHARE,
    RUNNING_SHARE,
    kv_bytes_per_block,
    longest_context,
    min_kv_bytes,
    size_kv_cache,
)
from engine.request import Request, SamplingParams

GLOBAL, SLIDING = AttentionKind.GLOBAL, AttentionKind.SLIDING
KV_LAYOUTS: tuple[KVLayout, ...] = ("values", "projection", "separate")


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def make_request(num_tokens: int) -> Request:
    return Request("r", list(range(num_tokens)), SamplingParams(), seed=0, max_tokens=1)


def make_spec(**overrides: object) -> ModelSpec:
    config = {
        "model_type": "gemma4_text",
        "vocab_size": 100,
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "intermediate_size": 128,
        "sliding_window": 64,
        "hidden_size_per_layer_input": 0,
    }
    return ModelSpec.from_config(config | overrides)


def test_a_pool_hands_out_every_block_but_the_null_block() -> None:
    pool = BlockPool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert (pool.num_free, pool.num_used) == (0, 4)
    with pytest.raises(AssertionError):
        pool.allocate(1)


def test_a_block_cannot_be_freed_twice() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(1)
    pool.free(blocks)
    assert pool.num_used == 0
    with pytest.raises(AssertionError):
        pool.free(blocks)
    pool.check_integrity()


def test_the_block_freed_longest_ago_is_reused_first() -> None:
    pool = BlockPool(4)
    first, second, third = pool.allocate(3)
    pool.free([second])
    pool.free([first, third])
    assert pool.allocate(3) == [second, first, third]


def test_a_block_is_found_by_its_hash_while_somebody_holds_it() -> None:
    pool = BlockPool(4)
    (block,) = pool.allocate(1)
    pool.register(block, b"hash")
    pool.keep(block)
    pool.free([block])
    assert (pool.num_used, pool.num_cached, pool.num_unused, pool.num_free) == (0, 1, 2, 3)
    with pytest.raises(AssertionError):
        pool.allocate(3)
    assert pool.find(b"hash") == block
    pool.take(block)
    pool.unkeep(block)
    assert pool.find(b"hash") == block and pool.num_used == 1
    pool.free([block])
    assert pool.find(b"hash") is None and pool.num_unused == 3
    pool.check_integrity()


@given(seed=st.integers(0, 2**32), num_blocks=st.integers(2, 40))
@settings(max_examples=50, deadline=None)
def test_no_block_is_lost_or_given_twice(seed: int, num_blocks: int) -> None:
    rng, pool = random.Random(seed), BlockPool(num_blocks)
    held: list[int] = []
    kept: list[int] = []
    for step in range(100):
        match rng.randrange(5):
            case 0:
                blocks = pool.allocate(rng.randint(0, pool.num_unused))
                assert not set(blocks) & {*held, *kept} and NULL_BLOCK not in blocks
                for block in blocks[::2]:
                    pool.register(block, b"%d %d" % (step, block))
                held += blocks
            case 1 if held:
                pool.free([held.pop(rng.randrange(len(held)))])
            case 2 if named := [block for _, block in pool.registered()]:
                kept.append(rng.choice(named))
                pool.keep(kept[-1])
            case 3 if kept:
                pool.unkeep(kept.pop(rng.randrange(len(kept))))
            case 4 if kept:
                held.append(rng.choice(kept))
                pool.take(held[-1])
        pool.check_integrity()
        assert pool.num_used == len(set(held))
        assert pool.num_cached == len(set(kept) - set(held))
    pool.free(held)
    for block in kept:
        pool.unkeep(block)
    assert pool.num_free == num_blocks - 1


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("window", [1, 5, 16, 64])
@pytest.mark.parametrize("chunk", [1, 7, 48])
def test_a_request_holds_what_its_queries_read_and_little_more(
    block_size: int, window: int, chunk: int
) -> None:
    num_tokens = 200
    config = KVCacheConfig(block_size, {GLOBAL: 300, SLIDING: 300})
    kv = KVCache(config, sliding_window=window, max_num_seqs=2, max_model_len=num_tokens)
    request = make_request(num_tokens)
    kv.add(request, kv.find_prefix(request))
    row = kv.row(request)
    sliding = kv.groups[SLIDING]
    while request.num_pending_tokens:
        num_new = min(chunk, request.num_pending_tokens)
        kv.allocate(request, num_new)
        start, stop = request.num_computed_tokens, request.num_computed_tokens + num_new
        for position in range(max(0, start - window + 1), stop):
            assert sliding.block_tables[row, position // block_size] != NULL_BLOCK
        # The window at the last full block, and the blocks that an unaligned chunk touches.
        assert (
            sliding.num_held(row) <= cdiv(window - 1, block_size) + cdiv(chunk - 1, block_size) + 1
        )
        assert kv.groups[GLOBAL].num_held(row) == -(-stop // block_size)
        request.num_computed_tokens = stop
        kv.commit(request)
        kv.check_integrity()
        # Ends before the window at the last full block.
        last_behind = (stop // block_size * block_size - window) // block_size - 1
        if last_behind >= 0:
            assert sliding.block_tables[row, last_behind] == NULL_BLOCK
    kv.free(request)
    kv.check_integrity()
    assert all(group.pool.num_used == 0 for group in kv.groups.values())


def test_a_kind_without_layers_has_no_group() -> None:
    kv = KVCache(
        KVCacheConfig(4, {GLOBAL: 9, SLIDING: 0}),
        sliding_window=8,
        max_num_seqs=1,
        max_model_len=32,
    )
    assert list(kv.groups) == [GLOBAL]
    assert kv.max_request_tokens == 32


def test_bytes_count_only_layers_that_own_keys_and_values() -> None:
    spec = make_spec()
    assert kv_bytes_per_block(spec, GLOBAL, 16, torch.float32) == 2 * 16 * 2 * 32 * 4
    assert kv_bytes_per_block(spec, SLIDING, 16, torch.bfloat16) == 5 * 2 * 16 * 2 * 16 * 2
    shared = make_spec(num_hidden_layers=12, num_kv_shared_layers=6)
    assert kv_bytes_per_block(shared, GLOBAL, 16, torch.float32) == 2 * 16 * 2 * 32 * 4


def test_one_row_is_half_and_holds_a_longer_context() -> None:
    spec, dtype = make_spec(attention_k_eq_v=True), torch.float32
    for kind, share in ((GLOBAL, 2), (SLIDING, 1)):
        of = {rows: kv_bytes_per_block(spec, kind, 16, dtype, rows) for rows in KV_LAYOUTS}
        assert of["values"] == of["projection"] and of["values"] * share == of["separate"]
    longest = {r: longest_context(spec, 5_000_000, dtype=dtype, kv_layout=r) for r in KV_LAYOUTS}
    assert (
        longest["values"] == longest["projection"] == pytest.approx(2 * longest["separate"], abs=32)
    )
    configs = {
        r: size_kv_cache(spec, 5_000_000, 1024, dtype=dtype, kv_layout=r) for r in KV_LAYOUTS
    }
    assert configs["values"].num_blocks[GLOBAL] > 1.5 * configs["separate"].num_blocks[GLOBAL]
    assert {rows: config.kv_layout for rows, config in configs.items()} == {
        rows: rows for rows in KV_LAYOUTS
    }


@pytest.mark.parametrize("kv_bytes", [2_000_000, 5_000_000, 10**9])
def test_sizes_use_the_budget_and_hold_a_request_of_full_length(kv_bytes: int) -> None:
    spec = make_spec()
    config = size_kv_cache(spec, kv_bytes, 1024, dtype=torch.float32, max_num_seqs=8)
    per_block = {kind: kv_bytes_per_block(spec, kind, 16, torch.float32) for kind in AttentionKind}
    used = sum(config.num_blocks[kind] * per_block[kind] for kind in AttentionKind)
    assert used <= kv_bytes
    assert config.num_blocks[GLOBAL] - 1 >= 1024 // 16
    assert used > kv_bytes - per_block[GLOBAL]
    KVCache(config, sliding_window=64, max_num_seqs=8, max_model_len=1024)


def test_sizes_without_prefix_caching_stop_at_what_can_be_used() -> None:
    options: dict[str, Any] = {"dtype": torch.float32, "max_num_seqs": 8, "prefix_caching": False}
    config = size_kv_cache(make_spec(), 10**9, 1024, **options)
    assert config.num_blocks[GLOBAL] == 1 + 8 * 1024 // 16


def test_a_share_of_the_memory_is_for_kept_windows() -> None:
    spec, kv_bytes = make_spec(), 20_000_000
    options: dict[str, Any] = {"dtype": torch.float32, "max_num_seqs": 4}
    without = size_kv_cache(spec, kv_bytes, 1024, prefix_caching=False, **options)
    kept = size_kv_cache(spec, kv_bytes, 1024, **options)
    spare = kv_bytes - min_kv_bytes(spec, 1024, dtype=torch.float32)
    num_kept = int(KEPT_SHARE * spare) // kept.block_bytes[SLIDING]
    assert kept.num_blocks[SLIDING] == without.num_blocks[SLIDING] + num_kept
    assert (
        min_kv_bytes(spec, 1024, dtype=torch.float32) < kv_bytes / 2
    )  # the share is one to speak of

    # Where memory is short running requests get no more than half of it, and contexts the rest.
    options["max_num_seqs"] = 1000
    short = size_kv_cache(spec, kv_bytes, 1024, **options)
    for_sliding = short.num_blocks[SLIDING] * short.block_bytes[SLIDING]
    assert (RUNNING_SHARE + KEPT_SHARE) * spare * 0.95 < for_sliding
    assert (
        short.num_blocks[GLOBAL] * short.block_bytes[GLOBAL]
        > (1 - RUNNING_SHARE - KEPT_SHARE) * spare
    )


def test_sizes_of_a_model_without_sliding_layers() -> None:
    spec = make_spec(layer_types=["full_attention"] * 6)
    config = size_kv_cache(spec, 10_000_000, 1024, dtype=torch.float32)
    assert config.num_blocks[SLIDING] == 0 and config.num_blocks[GLOBAL] > 64


def test_too_little_memory_says_how_much_is_needed() -> None:
    with pytest.raises(NotEnoughMemory, match=r"1024 tokens takes \d+\.\d MB; 0\.1 MB are free"):
        size_kv_cache(make_spec(), 100_000, 1024, dtype=torch.float32)


def test_the_longest_context_just_fits() -> None:
    spec = make_spec()
    for kv_bytes in (200_000, 500_000, 2_000_000):
        longest = longest_context(spec, kv_bytes, dtype=torch.float32)
        size_kv_cache(spec, kv_bytes, longest, dtype=torch.float32)
        with pytest.raises(NotEnoughMemory, match="Lower engine"):
            size_kv_cache(spec, kv_bytes, longest + 1, dtype=torch.float32)
    whole = spec.max_position_embeddings
    assert longest_context(spec, 10**12, dtype=torch.float32) == whole
    assert longest_context(spec, 1, dtype=torch.float32) == 1


def test_a_window_that_does_not_fit_is_refused() -> None:
    config = KVCacheConfig(16, {GLOBAL: 100, SLIDING: 3})
    with pytest.raises(NotEnoughMemory, match="sliding_attention"):
        KVCache(config, sliding_window=64, max_num_seqs=1, max_model_len=256)


def test_an_only_sliding_cache_bounds_no_length() -> None:
    kv = KVCache(
        KVCacheConfig(4, {SLIDING: 9}), sliding_window=8, max_num_seqs=1, max_model_len=10_000
    )
    request = make_request(10_000)
    assert kv.max_request_tokens is None and kv.can_hold(request, kv.find_prefix(request))


def test_config_is_a_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        KVCacheConfig(16, {}).block_size = 8  # type: ignore[misc]
