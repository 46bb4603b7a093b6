"""Random checkpoints that hold nothing but experts, for the tests of experts/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cluster.spec import ModelSpec

NUM_EXPERTS, TOP_K, HIDDEN, INNER, NUM_LAYERS = 8, 3, 48, 20, 2


def tiny_config(hidden: int = HIDDEN, num_layers: int = NUM_LAYERS) -> dict[str, Any]:
    """A MoE geometry; only what experts/ reads matters."""
    return {
        "model_type": "gemma4_text",
        "vocab_size": 64,
        "hidden_size": hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 32,
        "sliding_window": 8,
        "layer_types": ["full_attention"] * num_layers,
        "enable_moe_block": True,
        "num_experts": NUM_EXPERTS,
        "top_k_experts": TOP_K,
        "moe_intermediate_size": INNER,
    }


def tiny_spec(hidden: int = HIDDEN) -> ModelSpec:
    """The spec of `tiny_config`."""
    return ModelSpec.from_config(tiny_config(hidden))


def save_experts(path: Path, seed: int = 0) -> Path:
    """Write a checkpoint directory of `tiny_config` with random expert tensors."""
    spec, generator = tiny_spec(), torch.Generator().manual_seed(seed)
    inner, hidden = spec.moe_intermediate_size, spec.hidden_size
    tensors: dict[str, Tensor] = {}
    for layer in range(spec.num_layers):
        prefix = f"{spec.tensor_prefix}layers.{layer}.experts."
        for name, shape in (
            ("gate_up_proj", (spec.num_experts, 2 * inner, hidden)),
            ("down_proj", (spec.num_experts, hidden, inner)),
        ):
            tensors[prefix + name] = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(tiny_config()))
    return path


def random_topk(spec: ModelSpec, num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [num_tokens, hidden], distinct expert ids and weights [num_tokens, k]."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, spec.hidden_size, generator=generator)
    scores = torch.rand(num_tokens, spec.num_experts, generator=generator)
    weights, ids = scores.topk(spec.top_k_experts)
    return hidden, ids, weights
