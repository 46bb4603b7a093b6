"""The sizes of contexts, and that the operator's page shows what the geometry gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import StoreConfig
from cluster.spec import AttentionKind, ModelSpec
from cluster.store.kv_size import KVSize, kv_size
from engine.cache.kv_sizing import kv_bytes_per_block

PAGE = Path(__file__).parents[3] / "docs" / "memory.md"
GIB = 1 << 30
LENGTHS = (32_768, 131_072, 262_144)

# (layers, one of so many is global, KV heads sliding and global, window, K = V, layers that share)
GEOMETRY = {
    "E2B": (35, 5, 1, 1, 512, False, 20),
    "E4B": (42, 6, 2, 2, 512, False, 18),
    "12B": (48, 6, 8, 1, 1024, True, 0),
    "26B-A4B": (30, 6, 8, 2, 1024, True, 0),
    "31B": (60, 6, 16, 4, 1024, True, 0),
}


def spec_of(model: str) -> ModelSpec:
    layers, period, kv_heads, global_kv_heads, window, k_eq_v, shared = GEOMETRY[model]
    kinds = ["sliding_attention"] * (period - 1) + ["full_attention"]
    config: dict[str, Any] = {
        "model_type": "gemma4_text",
        "vocab_size": 262_144,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "layer_types": kinds * (layers // period),
        "num_attention_heads": kv_heads,
        "num_key_value_heads": kv_heads,
        "num_global_key_value_heads": global_kv_heads,
        "head_dim": 256,
        "global_head_dim": 512,
        "sliding_window": window,
        "attention_k_eq_v": k_eq_v,
        "num_kv_shared_layers": shared,
    }
    return ModelSpec.from_config(config)


def test_the_26b_as_it_was_counted() -> None:
    spec = spec_of("26B-A4B")
    assert kv_size(spec, 1).global_bytes == 10_240
    assert kv_size(spec, 1, kv_layout="separate").global_bytes == 20_480
    assert kv_size(spec, 1, element_bytes=4).global_bytes == 20_480
    assert kv_size(spec, 131_072).window_bytes == 25 * 8 * 256 * 2 * 2 * 1024
    assert kv_size(spec, 131_072).num_bytes / GIB == pytest.approx(1.45, abs=0.005)


def test_a_context_shorter_than_the_window_has_no_more_than_itself() -> None:
    spec = spec_of("E4B")
    assert kv_size(spec, 10).window_bytes * 51.2 == kv_size(spec, 5000).window_bytes


@pytest.mark.parametrize("model", GEOMETRY)
def test_the_engine_allocates_as_much(model: str) -> None:
    spec = spec_of(model)
    for kv_layout in ("values", "projection", "separate"):
        of_block = kv_bytes_per_block(spec, AttentionKind.GLOBAL, 16, torch.bfloat16, kv_layout)
        assert kv_size(spec, 16, kv_layout=kv_layout).global_bytes == of_block


@pytest.mark.parametrize("model", GEOMETRY)
def test_the_page_shows_what_the_geometry_gives(model: str) -> None:
    assert row_of(model) in PAGE.read_text().splitlines()


def test_the_page_says_for_which_models_the_defaults_are_too_small() -> None:
    store, page = StoreConfig(), PAGE.read_text()

    def too_small(limit: int, length: int, of: Callable[[KVSize], int]) -> list[str]:
        return [name for name in GEOMETRY if of(kv_size(spec_of(name), length)) > limit]

    windows = too_small(store.queue_bytes, 131_072, lambda size: size.window_bytes)
    assert not windows and "The default of 1 GiB holds one of every model" in page
    contexts = too_small(store.tenant_bytes, 131_072, lambda size: size.num_bytes)
    assert contexts == ["E4B", "31B"] and "E4B (just), 31B and contexts of 256K need more" in page
    longest = too_small(store.tenant_bytes, 262_144, lambda size: size.num_bytes)
    assert set(longest) >= {"12B", "26B-A4B", "31B"}


def row_of(model: str) -> str:
    spec = spec_of(model)
    longest = 131_072 if model.startswith("E") else 262_144
    sizes = [
        f"{kv_size(spec, length).num_bytes / GIB:.2f} GiB" if length <= longest else "-"
        for length in LENGTHS
    ]
    one = kv_size(spec, 1)
    window_mib = kv_size(spec, longest).window_bytes / (1 << 20)
    return f"| {model} | {one.global_bytes:,} B | {window_mib:.0f} MiB | {' | '.join(sizes)} |"
