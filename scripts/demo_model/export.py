"""Writes the checkpoint in the layout of the released Gemma 4 models."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from demo_model.shape import CHAT_TEMPLATE, CONFIG
from demo_model.tokenizer import BOS, EOS, PAD, TURN_END
from demo_model.training import Run


def export(run: Run, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        n: t.detach().to(torch.bfloat16).contiguous()
        for n, t in run.model.state_dict().items()
        if n != "lm_head.weight"
    }
    made_by = {
        "format": "pt",
        "steps": str(run.step),
        "minutes": f"{run.seconds / 60:.1f}",
        "seed": str(run.seed),
        "threads": str(torch.get_num_threads()),
        "note": run.note,
    }
    save_file(tensors, out / "model.safetensors.tmp", metadata=made_by)
    os.chmod(out / "model.safetensors.tmp", 0o644)
    os.replace(out / "model.safetensors.tmp", out / "model.safetensors")
    generation = {
        "bos_token_id": BOS,
        "do_sample": True,
        "eos_token_id": [EOS, TURN_END],
        "pad_token_id": PAD,
        "temperature": 1.0,
        "top_k": 64,
        "top_p": 0.95,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": ["<|turn>", "<turn|>"],
        "model_max_length": CONFIG["max_position_embeddings"],
        "padding_side": "left",
    }
    for name, data in (
        ("config", CONFIG),
        ("generation_config", generation),
        ("tokenizer_config", tokenizer_config),
    ):
        write_atomically(out / f"{name}.json", json.dumps(data, indent=2) + "\n")
    write_atomically(out / "tokenizer.json", run.batches.tokenizer.to_str(pretty=False) + "\n")
    write_atomically(out / "chat_template.jinja", CHAT_TEMPLATE)


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
