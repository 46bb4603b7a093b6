"""ModelSpec: what config.json says about each layer, against transformers' own reading of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import CheckpointError
from cluster.spec import AttentionKind, ModelSpec
from tests.support.engine.tiny_models import nest, tiny_model

CASES: list[tuple[str, dict[str, Any]]] = [
    ("26b", {}),
    ("26b", {"attention_k_eq_v": False}),
    ("31b", {"num_global_key_value_heads": None}),
    ("12b", {"sliding_window": 77}),
    ("e4b", {}),
    ("e2b", {"layer_types": None, "num_hidden_layers": 13, "num_kv_shared_layers": 6}),
    ("e2b", {"layer_types": ["full_attention", "sliding_attention"] * 3}),
]


def text_config(**changes: Any) -> dict[str, Any]:
    config = {
        "model_type": "gemma4_text",
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 4,
    }
    config.update(changes)
    return {key: value for key, value in config.items() if value is not None}


@pytest.mark.parametrize(("member", "overrides"), CASES)
def test_layers_as_transformers_reads_them(
    tmp_path: Path, member: str, overrides: dict[str, Any]
) -> None:
    model = tiny_model(member, **overrides)
    model.config.save_pretrained(tmp_path)
    spec, config = ModelSpec.load(tmp_path), model.config
    assert spec.num_layers == config.num_hidden_layers
    assert spec.sliding_window == config.sliding_window
    assert spec.is_moe == bool(getattr(config, "enable_moe_block", False))
    for layer, module in zip(spec.layers, model.model.layers, strict=True):
        attention = module.self_attn
        own = config.per_layer_config[layer.layer_idx]
        assert layer.kind.value == config.layer_types[layer.layer_idx]
        assert layer.head_dim == own.head_dim
        assert layer.num_kv_heads == own.num_key_value_heads
        assert layer.owns_kv is not attention.is_kv_shared_layer
        assert layer.intermediate_size == module.mlp.gate_proj.out_features
        if layer.owns_kv:
            assert layer.k_eq_v == (attention.v_proj is None)
        else:
            owner = spec.layers[layer.kv_layer_idx]
            assert owner.kind is layer.kind
            assert config.kv_sharing_modes[owner.layer_idx] == "store"


def test_nested_config(tmp_path: Path) -> None:
    tiny_model("26b").save_pretrained(tmp_path)
    plain = ModelSpec.load(tmp_path)
    nest(tmp_path, "gemma4")
    nested = ModelSpec.load(tmp_path)
    assert (plain.tensor_prefix, nested.tensor_prefix) == ("model.", "model.language_model.")
    assert nested.layers == plain.layers


def test_end_of_sequence_ids_come_from_the_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(text_config(eos_token_id=1)))
    assert ModelSpec.load(tmp_path).eos_token_ids == (1,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 106, 50]}))
    assert ModelSpec.load(tmp_path).eos_token_ids == (1, 106, 50)


def test_defaults() -> None:
    spec = ModelSpec.from_config(text_config(num_hidden_layers=12))
    kinds = [layer.kind for layer in spec.layers]
    assert kinds == ([AttentionKind.SLIDING] * 5 + [AttentionKind.GLOBAL]) * 2
    assert spec.rope[AttentionKind.GLOBAL].partial_rotary_factor == 0.25
    assert spec.rope[AttentionKind.SLIDING].theta == 1e4
    assert spec.tie_word_embeddings and spec.final_logit_softcapping is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "llama"}, "Unknown model_type 'llama'"),
        ({"model_type": None}, "Unknown model_type None"),
        ({"model_type": "gemma4"}, "no 'text_config'"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"enable_moe_block": True}, "no 'num_experts'"),
        ({"layer_types": ["full_attention"]}, "layer_types lists 1 layers"),
        ({"layer_types": ["full_attention", "linear"]}, "layer_types: 'linear'"),
        ({"hidden_activation": "silu"}, "hidden_activation 'silu'"),
        ({"use_bidirectional_attention": "all"}, "can't generate text"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type 'yarn'"),
        ({"num_kv_shared_layers": 1}, "No layer owns the KV cache"),
        ({"model_type": "gemma4", "text_config": "x"}, "text_config in config.json must be an"),
        ({"hidden_size": "48"}, "hidden_size in config.json must be a whole number above 0, not"),
        ({"num_hidden_layers": 0}, "num_hidden_layers in config.json must be a whole number"),
        ({"rope_parameters": {"full_attention": {"partial_rotary_factor": 1}}}, "no 'rope_theta'"),
        ({"rope_parameters": "x"}, "not a Gemma 4 config: AttributeError"),
        (
            {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 99},
            "top_k_experts is 99 of 8 experts",
        ),
    ],
)
def test_refused_configs(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        ModelSpec.from_config(text_config(**changes))


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        ModelSpec.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ModelSpec.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        ModelSpec.load(tmp_path)
