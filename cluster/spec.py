"""ModelSpec: the geometry of a Gemma 4 text decoder, layer by layer, parsed from config.json."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from cluster.errors import CheckpointError

TEXT_MODEL_TYPES = ("gemma4_text", "gemma4_unified_text")
MULTIMODAL_MODEL_TYPES = ("gemma4", "gemma4_unified")

# What the KV cache keeps per token in layers whose K and V share a projection
# (`attention_k_eq_v`): the values, the projection before its norms, or separate keys and values.
KVLayout: TypeAlias = Literal["values", "projection", "separate"]


class AttentionKind(enum.Enum):
    """What a layer sees, by the names that config.json uses."""

    SLIDING = "sliding_attention"
    GLOBAL = "full_attention"

    __hash__ = object.__hash__  # Enum's own is a Python function, and members are singletons


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of one attention kind.

    `proportional` rotates the first `partial_rotary_factor` of the frequency pairs and leaves the
    rest still, with the exponents of the whole head_dim (transformers' modeling_rope_utils).
    """

    theta: float
    partial_rotary_factor: float = 1.0
    factor: float = 1.0  # positions are divided by this


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer."""

    layer_idx: int
    kind: AttentionKind
    num_kv_heads: int
    head_dim: int
    k_eq_v: bool  # values come from k_proj; there is no v_proj
    kv_layer_idx: int  # the layer whose keys and values are read; its own index where it has some
    intermediate_size: int  # of the dense MLP

    @property
    def owns_kv(self) -> bool:
        """True if the layer caches keys and values of its own."""
        return self.kv_layer_idx == self.layer_idx

    def has_shared_kv(self, kv_layout: KVLayout) -> bool:
        """True if keys and values are formed from one cached tensor."""
        return self.k_eq_v and kv_layout != "separate"

    def kv_elements(self, kv_layout: KVLayout) -> int:
        """Return the elements that a layer with a cache of its own holds for one token."""
        num_tensors = 1 if self.has_shared_kv(kv_layout) else 2
        return num_tensors * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything about the text decoder that isn't a weight. Sizes count elements, not bytes."""

    model_type: str
    tensor_prefix: str  # of the text decoder's tensors in the checkpoint, with the final dot
    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    sliding_window: int  # a token sees itself and sliding_window - 1 tokens before it
    rms_norm_eps: float
    max_position_embeddings: int
    final_logit_softcapping: float | None
    tie_word_embeddings: bool
    attention_bias: bool
    rope: Mapping[AttentionKind, RopeSpec]
    layers: tuple[LayerSpec, ...]
    ple_size: int  # per-layer embedding width; 0 where the model has none
    ple_vocab_size: int
    num_experts: int  # 0 where the model is dense
    top_k_experts: int
    moe_intermediate_size: int
    bos_token_id: int | None
    pad_token_id: int  # what per-layer embeddings are looked up by where there is no token
    eos_token_ids: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @staticmethod
    def load(model_dir: Path) -> ModelSpec:
        """Read `model_dir/config.json` (and generation_config.json for the end-of-sequence ids).

        Raises CheckpointError when a file or a key is missing or the model_type is not ours.
        """
        config = _read_json(model_dir / "config.json")
        generation = model_dir / "generation_config.json"
        if generation.exists():
            eos = _read_json(generation).get("eos_token_id")
            if eos is not None:
                config = {**config, "eos_token_id": eos}
        return ModelSpec.from_config(config)

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> ModelSpec:
        """Parse the parsed config.json of any member of the family.

        Raises CheckpointError for an unknown model_type, a missing key, a value of a wrong type, or
        a feature that text generation can't have (`use_bidirectional_attention: all`).
        """
        try:
            return ModelSpec._parse(config)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise CheckpointError(
                f"config.json is not a Gemma 4 config: {type(error).__name__}: {error}."
            ) from None

    @staticmethod
    def _parse(config: Mapping[str, Any]) -> ModelSpec:
        model_type = config.get("model_type")
        if model_type in MULTIMODAL_MODEL_TYPES:
            text: Mapping[str, Any] = _require(config, "text_config")
            prefix = "model.language_model."
        elif model_type in TEXT_MODEL_TYPES:
            text, prefix = config, "model."
        else:
            known = ", ".join(MULTIMODAL_MODEL_TYPES + TEXT_MODEL_TYPES)
            raise CheckpointError(f"Unknown model_type {model_type!r}; Briolette serves {known}.")
        if not isinstance(text, Mapping):
            raise CheckpointError("text_config in config.json must be an object.")
        _refuse_unsupported(text)
        is_moe = bool(text.get("enable_moe_block", False))
        num_experts = _require_count(text, "num_experts") if is_moe else 0
        top_k_experts = _require_count(text, "top_k_experts") if is_moe else 0
        if top_k_experts > num_experts:
            raise CheckpointError(f"top_k_experts is {top_k_experts} of {num_experts} experts.")
        eos = config.get("eos_token_id", text.get("eos_token_id", 1))
        return ModelSpec(
            model_type=str(model_type),
            tensor_prefix=prefix,
            vocab_size=_require_count(text, "vocab_size"),
            hidden_size=_require_count(text, "hidden_size"),
            num_attention_heads=_require_count(text, "num_attention_heads"),
            sliding_window=_require_count(text, "sliding_window"),
            rms_norm_eps=text.get("rms_norm_eps", 1e-6),
            max_position_embeddings=text.get("max_position_embeddings", 131_072),
            final_logit_softcapping=text.get("final_logit_softcapping"),
            tie_word_embeddings=config.get(
                "tie_word_embeddings", text.get("tie_word_embeddings", True)
            ),
            attention_bias=text.get("attention_bias", False),
            rope={kind: _rope(text, kind) for kind in AttentionKind},
            layers=_layers(text),
            ple_size=text.get("hidden_size_per_layer_input", _ple_default(text)) or 0,
            ple_vocab_size=text.get("vocab_size_per_layer_input", 262_144),
            num_experts=num_experts,
            top_k_experts=top_k_experts,
            moe_intermediate_size=_require_count(text, "moe_intermediate_size") if is_moe else 0,
            bos_token_id=text.get("bos_token_id", 2),
            pad_token_id=text.get("pad_token_id") or 0,
            eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else (int(eos),),
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; is this a model directory?") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no JSON object.")
    return config


def _require(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    if value is None:
        raise CheckpointError(f"config.json has no {key!r}.")
    return value


def _require_count(config: Mapping[str, Any], key: str) -> int:
    value = _require(config, key)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"{key} in config.json must be a whole number above 0, not {value!r}."
        )
    return value


def _ple_default(text: Mapping[str, Any]) -> int:
    """transformers fills in 256 where the key is absent; the unified model has no such table."""
    return 0 if text.get("model_type") == "gemma4_unified_text" else 256


def _refuse_unsupported(text: Mapping[str, Any]) -> None:
    if text.get("use_bidirectional_attention") == "all":
        raise CheckpointError("use_bidirectional_attention 'all' can't generate text.")
    activation = text.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise CheckpointError(f"hidden_activation {activation!r} is not supported.")


def _rope(text: Mapping[str, Any], kind: AttentionKind) -> RopeSpec:
    is_global = kind is AttentionKind.GLOBAL
    default: dict[str, Any] = {
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.25,
        "rope_type": "proportional",
    }
    params = (text.get("rope_parameters") or {}).get(kind.value)
    if params is None:
        params = default if is_global else {"rope_theta": 1e4}
    rope_type = params.get("rope_type", "default")
    if rope_type not in ("default", "proportional"):
        raise CheckpointError(f"rope_type {rope_type!r} of {kind.value} is not supported.")
    if params.get("rope_theta") is None:
        raise CheckpointError(f"rope_parameters of {kind.value} have no 'rope_theta'.")
    if rope_type == "default":
        return RopeSpec(theta=float(params["rope_theta"]))
    return RopeSpec(
        theta=float(params["rope_theta"]),
        partial_rotary_factor=float(params.get("partial_rotary_factor", 1.0)),
        factor=float(params.get("factor", 1.0)),
    )


def _kinds(text: Mapping[str, Any]) -> list[AttentionKind]:
    """Five sliding layers, then a global one, unless the config lists them; the last is global."""
    num_layers = _require_count(text, "num_hidden_layers")
    names = text.get("layer_types")
    if names is None:
        names = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(num_layers)]
    if len(names) != num_layers:
        raise CheckpointError(
            f"layer_types lists {len(names)} layers, num_hidden_layers says {num_layers}."
        )
    try:
        kinds = [AttentionKind(name) for name in names]
    except ValueError as error:
        raise CheckpointError(f"layer_types: {error}.") from None
    kinds[-1] = AttentionKind.GLOBAL
    return kinds


def _layers(text: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    kinds = _kinds(text)
    num_owning = len(kinds) - int(text.get("num_kv_shared_layers", 0))
    last_owner = {kind: idx for idx, kind in enumerate(kinds[:num_owning])}
    missing = set(kinds) - set(last_owner)
    if missing:
        raise CheckpointError(f"No layer owns the KV cache of {sorted(k.value for k in missing)}.")
    return tuple(
        _layer(text, idx, kind, kv_layer_idx=idx if idx < num_owning else last_owner[kind])
        for idx, kind in enumerate(kinds)
    )


def _layer(
    text: Mapping[str, Any], layer_idx: int, kind: AttentionKind, kv_layer_idx: int
) -> LayerSpec:
    is_global = kind is AttentionKind.GLOBAL
    k_eq_v = bool(text.get("attention_k_eq_v", False)) and is_global
    num_kv_heads = _require_count(text, "num_key_value_heads")
    gates_kv_heads = bool(text.get("attention_k_eq_v", False))
    if is_global and gates_kv_heads and text.get("num_global_key_value_heads") is not None:
        num_kv_heads = int(text["num_global_key_value_heads"])
    overrides = _per_layer_override(text, layer_idx)
    head_dim = text.get("global_head_dim", 512) if is_global else _require_count(text, "head_dim")
    is_double_wide = bool(text.get("use_double_wide_mlp", False)) and kv_layer_idx != layer_idx
    return LayerSpec(
        layer_idx=layer_idx,
        kind=kind,
        num_kv_heads=int(overrides.get("num_key_value_heads", num_kv_heads)),
        head_dim=int(overrides.get("head_dim", head_dim)),
        k_eq_v=k_eq_v,
        kv_layer_idx=kv_layer_idx,
        intermediate_size=_require_count(text, "intermediate_size") * (2 if is_double_wide else 1),
    )


def _per_layer_override(text: Mapping[str, Any], layer_idx: int) -> Mapping[str, Any]:
    """`per_layer_config` as newer transformers writes it: keyed by layer index."""
    table = text.get("per_layer_config") or {}
    if isinstance(table, list):
        return cast(Mapping[str, Any], table[layer_idx] or {})
    by_layer = {int(key): value for key, value in table.items()}  # written "05": zero-padded
    return cast(Mapping[str, Any], by_layer.get(layer_idx, {}))
