"""The geometry of the Gemma 4 family, with small widths: what the sizes of KV and prices need."""

from __future__ import annotations

from typing import Any

from cluster.spec import ModelSpec

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
