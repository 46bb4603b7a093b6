"""The sizes of the two KV cache groups, and that the operator's page shows what they give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import StoreConfig
from cluster.errors import NotEnoughMemory
from cluster.spec import AttentionKind, KVLayout, ModelSpec
from engine.cache.kv_cache import KVCache
from engine.cache.kv_sizing import (
    CHECKPOINT_SHARE,
    RUNNING_SHARE,
    kv_bytes_per_block,
    longest_context,
    min_kv_bytes,
    size_kv_cache,
)
from tests.support.engine.geometry import GEOMETRY, spec_of

GLOBAL, SLIDING = AttentionKind.GLOBAL, AttentionKind.SLIDING
KV_LAYOUTS: tuple[KVLayout, ...] = ("values", "projection", "separate")
PAGE = Path(__file__).parents[3] / "docs" / "guides" / "memory.md"
GIB = 1 << 30
LENGTHS = (32_768, 131_072, 262_144)


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
    num_kept = int(CHECKPOINT_SHARE * spare) // kept.block_bytes[SLIDING]
    assert kept.num_blocks[SLIDING] == without.num_blocks[SLIDING] + num_kept
    assert (
        min_kv_bytes(spec, 1024, dtype=torch.float32) < kv_bytes / 2
    )  # the share is one to speak of

    # Where memory is short running requests get no more than half of it, and contexts the rest.
    options["max_num_seqs"] = 1000
    short = size_kv_cache(spec, kv_bytes, 1024, **options)
    for_sliding = short.num_blocks[SLIDING] * short.block_bytes[SLIDING]
    assert (RUNNING_SHARE + CHECKPOINT_SHARE) * spare * 0.95 < for_sliding
    assert (
        short.num_blocks[GLOBAL] * short.block_bytes[GLOBAL]
        > (1 - RUNNING_SHARE - CHECKPOINT_SHARE) * spare
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


# The table of docs/guides/memory.md


def token_bytes(model: str) -> int:
    """Bytes of one token in the global layers, in bfloat16."""
    return kv_bytes_per_block(spec_of(model), GLOBAL, 1, torch.bfloat16)


def window_bytes(model: str) -> int:
    """Bytes of one checkpoint: the sliding layers' window."""
    spec = spec_of(model)
    return spec.sliding_window * kv_bytes_per_block(spec, SLIDING, 1, torch.bfloat16)


def context_bytes(model: str, num_tokens: int) -> int:
    """Bytes of a context with one checkpoint, the least that it can be resumed from."""
    return num_tokens * token_bytes(model) + window_bytes(model)


def test_the_26b_as_it_was_counted() -> None:
    assert token_bytes("26B-A4B") == 10_240
    spec = spec_of("26B-A4B")
    assert kv_bytes_per_block(spec, GLOBAL, 1, torch.bfloat16, "separate") == 20_480
    assert kv_bytes_per_block(spec, GLOBAL, 1, torch.float32) == 20_480
    assert window_bytes("26B-A4B") == 25 * 8 * 256 * 2 * 2 * 1024
    assert context_bytes("26B-A4B", 131_072) / GIB == pytest.approx(1.45, abs=0.005)


@pytest.mark.parametrize("model", GEOMETRY)
def test_the_page_shows_what_the_geometry_gives(model: str) -> None:
    assert row_of(model) in PAGE.read_text().splitlines()


def test_the_page_says_for_which_models_the_defaults_are_too_small() -> None:
    store, page = StoreConfig(), PAGE.read_text()
    windows = [name for name in GEOMETRY if window_bytes(name) > store.queue_bytes]
    assert not windows and "The default of 1 GiB holds one of every model" in page
    contexts = [name for name in GEOMETRY if context_bytes(name, 131_072) > store.tenant_bytes]
    assert contexts == ["E4B", "31B"] and "E4B (just), 31B and contexts of 256K need more" in page
    longest = [name for name in GEOMETRY if context_bytes(name, 262_144) > store.tenant_bytes]
    assert set(longest) >= {"12B", "26B-A4B", "31B"}


def row_of(model: str) -> str:
    longest = 131_072 if model.startswith("E") else 262_144
    sizes = [
        f"{context_bytes(model, length) / GIB:.2f} GiB" if length <= longest else "-"
        for length in LENGTHS
    ]
    window_mib = window_bytes(model) / (1 << 20)
    return f"| {model} | {token_bytes(model):,} B | {window_mib:.0f} MiB | {' | '.join(sizes)} |"
