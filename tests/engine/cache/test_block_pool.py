"""The block pool, block tables, and the blocks that a window moves past."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import NotEnoughMemory
from cluster.spec import AttentionKind
from engine.cache.block_hash import BlockHasher
from engine.cache.block_pool import NULL_BLOCK, BlockPool
from engine.cache.kv_cache import KVCache, KVCacheConfig
from engine.cache.kv_cache_group import cdiv
from engine.request import Request, SamplingParams

GLOBAL, SLIDING = AttentionKind.GLOBAL, AttentionKind.SLIDING


def make_request(num_tokens: int) -> Request:
    return Request("r", list(range(num_tokens)), SamplingParams(), seed=0, max_tokens=1)


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
    pool.pin(block)
    pool.free([block])
    assert (pool.num_used, pool.num_cached, pool.num_unused, pool.num_free) == (0, 1, 2, 3)
    with pytest.raises(AssertionError):
        pool.allocate(3)
    assert pool.find(b"hash") == block
    pool.take(block)
    pool.unpin(block)
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
                pool.pin(kept[-1])
            case 3 if kept:
                pool.unpin(kept.pop(rng.randrange(len(kept))))
            case 4 if kept:
                held.append(rng.choice(kept))
                pool.take(held[-1])
        pool.check_integrity()
        assert pool.num_used == len(set(held))
        assert pool.num_cached == len(set(kept) - set(held))
    pool.free(held)
    for block in kept:
        pool.unpin(block)
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
        assert kv.groups[GLOBAL].num_held(row) == cdiv(stop, block_size)
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


def test_the_example_in_the_head_of_the_module() -> None:
    config = KVCacheConfig(4, {GLOBAL: 9, SLIDING: 12})
    kv = KVCache(
        config,
        sliding_window=5,
        max_num_seqs=2,
        max_model_len=16,
        hasher=BlockHasher(4, "model"),
    )
    first, second = make_request(14), make_request(14)
    second.prompt_ids[12:] = [90, 91]
    for request in (first, second):
        prefix = kv.find_prefix(request)
        kv.add(request, prefix)
        request.num_computed_tokens = 4 * prefix.num_blocks
        kv.allocate(request, request.num_pending_tokens)
        request.num_computed_tokens = 14
        kv.commit(request)
    tables = {kind: group.block_tables for kind, group in kv.groups.items()}
    assert tables[GLOBAL].tolist() == [[1, 2, 3, 4], [1, 2, 3, 5]]
    (null, gone, third, fourth), resumed = tables[SLIDING].tolist()
    assert null == gone == NULL_BLOCK and NULL_BLOCK not in (third, fourth)
    assert resumed[:3] == [NULL_BLOCK, NULL_BLOCK, third] and resumed[3] != fourth
    sliding, full = kv.groups[SLIDING].pool, kv.groups[GLOBAL].pool
    assert sliding.ref_cnt(third) == 2 and [full.ref_cnt(i) for i in (1, 2, 3)] == [2, 2, 2]
    assert sliding.pin_cnt(third) == 1


def test_config_is_a_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        KVCacheConfig(16, {}).block_size = 8  # type: ignore[misc]
