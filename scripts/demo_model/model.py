"""The untrained model."""

from __future__ import annotations

import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from demo_model.shape import CONFIG

POST_NORMS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")


def new_model(seed: int) -> Gemma4ForCausalLM:
    torch.manual_seed(seed)
    model = Gemma4ForCausalLM(Gemma4TextConfig(**CONFIG))
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0.0, CONFIG["hidden_size"] ** -0.5)
        for name, p in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                # Attention has no 1/sqrt(d) here: keep the first logits near one.
                p.fill_(1.2 * p.numel() ** -0.25)
            elif name.endswith(POST_NORMS):
                # The token's embedding must survive sixteen additions to the residual.
                p.fill_(0.4)
    return model
