"""The shape of the model and its chat template."""

from __future__ import annotations

from typing import Any

from demo_model.tokenizer import BOS, EOS, PAD, VOCAB_SIZE

WINDOW = 64
NUM_EXPERTS = 16
TOP_K = 4

CONFIG: dict[str, Any] = {
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "dtype": "bfloat16",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": True,
    "bos_token_id": BOS,
    "enable_moe_block": True,
    "eos_token_id": EOS,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 64,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 128,
    "hidden_size_per_layer_input": 0,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "layer_types": ["sliding_attention"] * 5
    + ["full_attention", "sliding_attention", "full_attention"],
    "max_position_embeddings": 32768,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_experts": NUM_EXPERTS,
    "num_global_key_value_heads": 1,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 0,
    "pad_token_id": PAD,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25,
            "rope_theta": 1000000.0,
            "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": WINDOW,
    "tie_word_embeddings": True,
    "top_k_experts": TOP_K,
    "use_bidirectional_attention": None,
    "use_cache": True,
    "use_double_wide_mlp": False,
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
}

CHAT_TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' or message['role'] == 'model' -%}
        {%- set role = 'model' -%}
    {%- elif message['role'] in ['user', 'system'] -%}
        {%- set role = message['role'] -%}
    {%- else -%}
        {{- raise_exception('unknown role: ' ~ message['role']) -}}
    {%- endif -%}
    {{- '<|turn>' + role + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}
                {{- item['text'] | trim -}}
            {%- else -%}
                {{- raise_exception('this model reads text only, not: ' ~ item['type']) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""
