"""Write our safetensors as an fp32 GGUF, so that llama.cpp can serve the very same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.lib.models import NUM_SPECIAL_IDS, SPACE
from cluster.checkpoint import Checkpoint
from cluster.spec import AttentionKind, LayerSpec, ModelSpec

ARCH = "gemma4"
UNROTATED = 1e30  # a frequency divisor that leaves a pair of dims still

# Ours on the left, GGUF's on the right; both within a layer.
LAYER_TENSORS = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}


def write_gguf(model_dir: Path, path: Path) -> Path:
    """Write the checkpoint in `model_dir` to `path` as fp32 GGUF; an existing file is kept.

    The vocabulary is a stand-in (benches send token ids). Models with per-layer embeddings,
    KV-shared layers or an untied head are not written: NotImplementedError.
    """
    if path.exists():
        return path
    from gguf import GGUFWriter

    spec = ModelSpec.load(model_dir)
    if spec.ple_size or not spec.tie_word_embeddings or any(not x.owns_kv for x in spec.layers):
        raise NotImplementedError("Only tied models without PLE or KV sharing become GGUF.")
    staging = path.with_suffix(".tmp")
    writer = GGUFWriter(staging, ARCH)
    _add_geometry(writer, spec)
    _add_vocabulary(writer, spec)
    for name, tensor in gguf_tensors(spec, Checkpoint(model_dir)):
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return staging.rename(path)


def gguf_tensors(spec: ModelSpec, checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the text decoder under llama.cpp's name."""
    yield "token_embd.weight", checkpoint.read(f"{spec.tensor_prefix}embed_tokens.weight")
    yield "output_norm.weight", checkpoint.read(f"{spec.tensor_prefix}norm.weight")
    yield "rope_freqs.weight", _rope_divisors(spec)
    for layer in spec.layers:
        prefix = f"{spec.tensor_prefix}layers.{layer.layer_idx}."
        for ours, theirs in LAYER_TENSORS.items():
            if prefix + ours in checkpoint:
                yield f"blk.{layer.layer_idx}.{theirs}", checkpoint.read(prefix + ours)


def _rope_divisors(spec: ModelSpec) -> torch.Tensor:
    """One divisor per rotated pair of the global layers: `proportional` rotates the first few."""
    num_pairs = _layer_of(spec, AttentionKind.GLOBAL).head_dim // 2
    rope = spec.rope[AttentionKind.GLOBAL]
    divisors = torch.full((num_pairs,), UNROTATED)
    divisors[: int(rope.partial_rotary_factor * num_pairs)] = rope.factor
    return divisors


def _layer_of(spec: ModelSpec, kind: AttentionKind) -> LayerSpec:
    """Any layer of this kind, or the last one: a short model may have no sliding layer."""
    return next((layer for layer in spec.layers if layer.kind is kind), spec.layers[-1])


def _add_geometry(writer: Any, spec: ModelSpec) -> None:
    full = _layer_of(spec, AttentionKind.GLOBAL)
    sliding = _layer_of(spec, AttentionKind.SLIDING)
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length([layer.intermediate_size for layer in spec.layers])
    writer.add_head_count(spec.num_attention_heads)
    writer.add_head_count_kv([layer.num_kv_heads for layer in spec.layers])
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    writer.add_key_length(full.head_dim)
    writer.add_value_length(full.head_dim)
    writer.add_key_length_swa(sliding.head_dim)
    writer.add_value_length_swa(sliding.head_dim)
    writer.add_rope_dimension_count(full.head_dim)
    writer.add_rope_dimension_count_swa(sliding.head_dim)
    writer.add_rope_freq_base(spec.rope[AttentionKind.GLOBAL].theta)
    writer.add_rope_freq_base_swa(spec.rope[AttentionKind.SLIDING].theta)
    writer.add_sliding_window(spec.sliding_window)
    writer.add_sliding_window_pattern(
        [layer.kind is AttentionKind.SLIDING for layer in spec.layers]
    )
    writer.add_shared_kv_layers(0)
    writer.add_embedding_length_per_layer_input(0)
    if spec.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(spec.final_logit_softcapping)
    if spec.is_moe:
        writer.add_expert_count(spec.num_experts)
        writer.add_expert_used_count(spec.top_k_experts)
        writer.add_expert_feed_forward_length(spec.moe_intermediate_size)


def _add_vocabulary(writer: Any, spec: ModelSpec) -> None:
    """A vocabulary that only has to exist: a word for each id, and no text ever goes in."""
    from gguf import TokenType

    tokens = [f"{SPACE}w{token_id}" for token_id in range(spec.vocab_size)]
    types = [TokenType.NORMAL] * spec.vocab_size
    for token_id in range(NUM_SPECIAL_IDS):
        tokens[token_id], types[token_id] = f"<control{token_id}>", TokenType.CONTROL
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(token_id) for token_id in range(spec.vocab_size)])
    writer.add_token_types(types)
    writer.add_bos_token_id(spec.bos_token_id or 0)
    writer.add_eos_token_id(spec.eos_token_ids[0])
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
