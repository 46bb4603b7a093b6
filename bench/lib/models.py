"""The models that the benches run: a random mixture of experts and the demo checkpoint."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO_ROOT = Path(__file__).resolve().parents[2]
DEMO_DIR = REPO_ROOT / "demo" / "gemma4-moe-demo"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's sign for a space
VERSION = 3  # of the random weights that are kept between runs
NUM_SPECIAL_IDS = 8  # ids below are special tokens and never part of a prompt

# 49.4 M parameters, of which 37.7 M are experts and 17.0 M are read for a token.
MOE_50M: dict[str, Any] = {
    "vocab_size": 16_384,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 64,
    "global_head_dim": 128,
    "attention_k_eq_v": True,
    "sliding_window": 128,
    "max_position_embeddings": 4096,
    "enable_moe_block": True,
    "num_experts": 32,
    "top_k_experts": 4,
    "moe_intermediate_size": 128,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "final_logit_softcapping": 30.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}

# Small experts beside a large dense MLP: a host's answer takes the time that a bench injects.
LIGHT_EXPERTS = MOE_50M | {
    "vocab_size": 2048,
    "intermediate_size": 1024,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}
# The window of the 26B and a long context, in a model that computes some thousand tokens a second.
WIDE_WINDOW = MOE_50M | {
    "vocab_size": 2048,
    "num_experts": 8,
    "top_k_experts": 2,
    "sliding_window": 1024,
    "max_position_embeddings": 32_768,
}
# For thousands of small cases.
TINY_MOE = MOE_50M | {
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 70,
    "num_experts": 8,
    "top_k_experts": 3,
    "moe_intermediate_size": 96,
}
RANDOM_MODELS = {
    "moe-50m": MOE_50M,
    "light-experts": LIGHT_EXPERTS,
    "wide-window": WIDE_WINDOW,
    "tiny-moe": TINY_MOE,
}


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A model directory in the Hugging Face format, and how a bench calls it."""

    name: str
    model_dir: Path

    @property
    def vocab_size(self) -> int:
        config = json.loads((self.model_dir / "config.json").read_text())
        return int(config.get("text_config", config)["vocab_size"])


def bench_cache_dir() -> Path:
    """Where derived files (random weights, GGUF) live between runs."""
    root = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    path = Path(root) / "briolette" / "bench"
    path.mkdir(parents=True, exist_ok=True)
    return path


def load_models(names: list[str]) -> list[BenchModel]:
    """The benches' models by name: random ones, written once, and "demo", skipped where absent."""
    models = []
    for name in names:
        if name in RANDOM_MODELS:
            model_dir = bench_cache_dir() / f"{name}-v{VERSION}"
            models.append(BenchModel(name, random_moe(model_dir, RANDOM_MODELS[name])))
        elif name == "demo":
            if (DEMO_DIR / "config.json").exists():
                models.append(BenchModel(name, DEMO_DIR))
        else:
            known = ", ".join((*RANDOM_MODELS, "demo"))
            raise ValueError(f"Unknown bench model {name!r}; known are {known}.")
    return models


def random_moe(model_dir: Path, text_config: dict[str, Any], seed: int = 0) -> Path:
    """Write a random Gemma 4 text model in the real format, unless it is already there.

    Matrices are normal with variance 1 / fan_in, so that activations keep their size; norms and
    scales stay near 1. Written under a temporary name first: an interrupted run leaves nothing.
    """
    if (model_dir / "config.json").exists():
        return model_dir
    import torch
    from transformers.models.gemma4 import Gemma4ForCausalLM, Gemma4TextConfig

    generator = torch.Generator().manual_seed(seed)
    model = Gemma4ForCausalLM(Gemma4TextConfig(**text_config)).float()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() >= 2:
                tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)
            elif name.endswith(("norm.weight", "scale")) or "layernorm" in name:
                tensor.normal_(1.0, 0.1, generator=generator)
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                tensor.mul_(tensor.shape[0] ** -0.25)  # scores aren't scaled: no one-hot softmax
    staging = model_dir.with_name(f"{model_dir.name}.{os.getpid()}.tmp")
    model.save_pretrained(staging)
    write_word_tokenizer(staging, text_config["vocab_size"])
    if model_dir.exists():  # another run was faster
        return model_dir
    staging.rename(model_dir)
    return model_dir


def write_word_tokenizer(model_dir: Path, vocab_size: int) -> None:
    """A tokenizer for a random model: the text "w9 w10" is the ids [9, 10]."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<unused0>", "<unused1>"]
    assert len(special) == NUM_SPECIAL_IDS
    words = special + [f"{SPACE}w{token_id}" for token_id in range(len(special), vocab_size)]
    vocabulary = {word: token_id for token_id, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=["<|turn>", "<turn|>"],
    )
    fast.chat_template = (
        "{{ bos_token }}{% for message in messages %}<|turn>{{ message['content'] }}<turn|>"
        "{% endfor %}{% if add_generation_prompt %}<|turn>{% endif %}"
    )
    fast.save_pretrained(model_dir)


def random_prompts(
    model: BenchModel, num_prompts: int, prompt_len: int, seed: int
) -> list[list[int]]:
    """Prompts of random ordinary token ids; another seed gives others, so no cache can help."""
    import random

    rng = random.Random(seed)
    last = model.vocab_size - 1
    return [
        [rng.randint(NUM_SPECIAL_IDS, last) for _ in range(prompt_len)] for _ in range(num_prompts)
    ]
