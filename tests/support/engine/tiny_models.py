"""Tiny random models of every member of the family, made and saved by transformers."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    PreTrainedModel,
)
from transformers.models.gemma4_unified import (
    Gemma4UnifiedConfig,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
)

IMAGE_TOKEN_ID = 150

_COMMON: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 10,
    "max_position_embeddings": 512,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 160,
    "final_logit_softcapping": 30.0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_PER_LAYER = {"hidden_size_per_layer_input": 8}
_MEMBERS: dict[str, dict[str, Any]] = {
    "26b": {
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 3,
        "moe_intermediate_size": 24,
    },
    "31b": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "12b": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "e4b": {**_PER_LAYER, "num_kv_shared_layers": 3},
    "e2b": {
        **_PER_LAYER,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
    },
}


def tiny_model(name: str, **overrides: Any) -> PreTrainedModel:
    """A transformers model like `name` ("26b", "31b", "12b", "e4b" or "e2b") in fp32.

    `overrides` are fields of its config. The same arguments give the same weights.
    """
    config = _text_config(name, overrides)
    model_type = Gemma4UnifiedForCausalLM if name == "12b" else Gemma4ForCausalLM
    model = model_type(config)
    seed = zlib.crc32(f"{name} {sorted(overrides.items())}".encode())
    randomize(model, seed)
    return model.eval()


def tiny_multimodal(name: str, **overrides: Any) -> PreTrainedModel:
    """Build, like `tiny_model`, the decoder of a model that takes images; no vision tower."""
    fields: dict[str, Any] = {
        "text_config": _text_config(name, overrides),
        "vision_config": None,
        "audio_config": None,
        "image_token_id": IMAGE_TOKEN_ID,
    }
    model: PreTrainedModel
    if name == "12b":
        model = Gemma4UnifiedForConditionalGeneration(Gemma4UnifiedConfig(**fields))
    else:
        model = Gemma4ForConditionalGeneration(Gemma4Config(**fields))
    randomize(model, 5)
    return model.eval()


def _text_config(name: str, overrides: dict[str, Any]) -> Any:
    fields = {**_COMMON, **_MEMBERS[name], **overrides}
    if name != "12b":
        return Gemma4TextConfig(**fields)
    return Gemma4UnifiedTextConfig(
        **{key: value for key, value in fields.items() if "per_layer_input" not in key}
    )


def make_tiny(name: str, directory: Path, **overrides: Any) -> Path:
    """Save a tiny model as a checkpoint; returns its directory."""
    tiny_model(name, **overrides).save_pretrained(directory)
    return directory


def randomize(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter and saved buffer: most start at 1, and would hide a forgotten one."""
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict()  # shares memory with the model; leaves out what isn't saved
    with torch.no_grad():
        for name, tensor in saved.items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("bias"):
                tensor.copy_(0.2 * noise)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                tensor.copy_(0.5 + 0.1 * noise)  # scores of a size that training would give
            elif tensor.dim() == 1:
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(tensor.shape[-1] ** -0.5 * noise)


def nest(directory: Path, model_type: str) -> None:
    """Turn a saved text model into the layout of a multimodal one: a nested config, other names."""
    config = json.loads((directory / "config.json").read_text())
    nested = {"model_type": model_type, "text_config": config, "vision_config": {}}
    (directory / "config.json").write_text(json.dumps(nested))
    for path in directory.glob("*.safetensors"):
        tensors = {
            name.replace("model.", "model.language_model.", 1): tensor
            for name, tensor in load_file(path).items()
        }
        tensors["model.vision_tower.patch.weight"] = torch.zeros(4)
        save_file(tensors, path)
