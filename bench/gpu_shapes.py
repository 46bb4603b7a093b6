"""One GPU's worth of Gemma 4 without a checkpoint: shapes, random weights, an engine of them."""

from __future__ import annotations

import random
import sys
import types
from typing import Any, cast

import torch
from torch import Tensor

try:
    import safetensors  # noqa: F401 - cluster.checkpoint imports it
except ImportError:  # a bare machine: no file is read here, so an empty stand-in will do
    stand_in = types.ModuleType("safetensors")
    stand_in.__dict__.update(SafetensorError=OSError, safe_open=None)
    sys.modules["safetensors"] = stand_in

from cluster.checkpoint import Checkpoint
from cluster.placement import ExpertGroups
from cluster.spec import AttentionKind, ModelSpec
from engine.cache.kv_cache import KVCacheConfig
from engine.core import EngineCore
from engine.limits import SpecLimits
from engine.model.model import GemmaDecoder
from engine.runner import ModelRunner
from experts.local import LocalExperts

BLOCK_SIZE = 16
MAX_STREAMS, MAX_MODEL_LEN = 16, 512

CONFIG_26B: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": 262_144,
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "head_dim": 256,
    "global_head_dim": 512,
    "attention_k_eq_v": True,
    "sliding_window": 1024,
    "max_position_embeddings": 4096,
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "final_logit_softcapping": 30.0,
}
CONFIG_TINY: dict[str, Any] = CONFIG_26B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 16,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}
CONFIG_DENSE: dict[str, Any] = CONFIG_26B | {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "enable_moe_block": False,
}


class RandomCheckpoint:
    """Answers for any tensor: matrices of variance 1 / fan_in, vectors near 1, made where used."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self._device, self._dtype = device, dtype
        self._generator = torch.Generator(device=device).manual_seed(seed)

    def keys(self) -> list[str]:
        return []

    def __contains__(self, name: object) -> bool:
        return True

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        if len(shape) > 1:
            return tensor.normal_(0.0, shape[-1] ** -0.5, generator=self._generator)
        tensor.normal_(1.0, 0.1, generator=self._generator)
        # Scores aren't scaled in Gemma 4; so they get the usual spread, not a one-hot softmax.
        return (
            tensor.mul_(shape[0] ** -0.25)
            if name.endswith(("q_norm.weight", "k_norm.weight"))
            else tensor
        )

    def read_rows(self, name: str, rows: range, shape: tuple[int, ...]) -> Tensor:
        return self.read(name, (len(rows), *shape[1:]))


class KeptCheckpoint(RandomCheckpoint):
    """A random tensor that its name determines, so that two devices can be compared."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(torch.device("cpu"), torch.float32, seed)
        self._tensors: dict[str, Tensor] = {}

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._tensors:
            self._tensors[name] = super().read(name, shape)
        return self._tensors[name]

    def read_rows(self, name: str, rows: range, shape: tuple[int, ...]) -> Tensor:
        return self.read(name, shape)[rows.start : rows.stop]


def build_engine(
    spec: ModelSpec, checkpoint: RandomCheckpoint, device: torch.device, dtype: torch.dtype
) -> EngineCore:
    """Decoder and all experts on one device, with room for MAX_STREAMS requests."""
    weights = cast(Checkpoint, checkpoint)  # it answers the same questions
    model = GemmaDecoder.load(spec, weights, device, dtype)
    experts = None
    if spec.is_moe:
        groups = ExpertGroups(spec.num_experts, 1)
        experts = LocalExperts(spec, weights, groups, dtype=dtype, device=device)
    num_blocks = 1 + MAX_STREAMS * MAX_MODEL_LEN // BLOCK_SIZE
    kv = KVCacheConfig(BLOCK_SIZE, dict.fromkeys(AttentionKind, num_blocks))
    return EngineCore(
        ModelRunner(model, kv, experts),
        kv,
        spec_limits=SpecLimits.from_spec(spec, MAX_MODEL_LEN),
        max_num_seqs=MAX_STREAMS,
    )


def random_prompts(
    spec: ModelSpec, num_prompts: int, prompt_len: int, seed: int
) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(8, spec.vocab_size) for _ in range(prompt_len)] for _ in range(num_prompts)
    ]
