"""A faster forward pass for the training, with the same losses and gradients."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Gemma4ForCausalLM

from demo_model.shape import NUM_EXPERTS, TOP_K, WINDOW


def use_fast_layers(model: Gemma4ForCausalLM) -> None:
    """Same losses and gradients at half the processor time; rows of a multiple of WINDOW tokens."""
    torch._dynamo.config.recompile_limit = 64
    for layer in model.model.layers:
        layer.forward = FastLayer(layer)


class FastLayer:
    """One decoder layer's forward; anything but plain training goes to the original."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.original = layer, layer.forward
        self.weights = dict(layer.named_parameters())
        self.sliding = layer.self_attn.is_sliding

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seq = hidden_states.shape[1]
        if not (self.layer.training and torch.is_grad_enabled()) or seq % WINDOW:
            out: Tensor = self.original(hidden_states, *args, **kwargs)
            return out
        with torch.autocast("cpu", enabled=False):
            return self._run(hidden_states.float(), *kwargs["position_embeddings"])

    def _run(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        w = self.weights
        q, k, v = project(x, w, cos[0, :, None].float(), sin[0, :, None].float())
        if self.sliding:
            attended = window_attention(q, k, v, window_bias(x.shape[1] // WINDOW))
        else:
            attended = global_attention(q, k, v)
        x, dense, rows = after_attention(x, attended, w)
        _, top, chosen = self.layer.router(x.flatten(0, 1))  # the module, so that hooks see it
        return combine(x, dense, experts(rows, w, chosen), top, w)


class _Gather(torch.autograd.Function):
    """`rows[index]`, an index past the end giving zeros; the gradient is gathered as well.

    `back` holds for each row the places (`fan` of them) to which it went.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, back: Tensor, fan: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.fan = fan
        return F.pad(rows, (0, 0, 0, 1)).index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        grad = F.pad(grads[0], (0, 0, 0, 1)).index_select(0, back)
        if ctx.fan > 1:
            grad = grad.view(-1, ctx.fan, grad.shape[1]).sum(1)
        return grad, None, None, None


def gather(rows: Tensor, index: Tensor, back: Tensor, fan: int) -> Tensor:
    gathered: Tensor = _Gather.apply(rows, index, back, fan)  # type: ignore[no-untyped-call]
    return gathered


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.bfloat16(), weight.bfloat16())


def rms(x: Tensor, weight: Tensor | None = None) -> Tensor:
    x = x.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x if weight is None else x * weight


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos + turned * sin


@torch.compile(dynamic=False)
def project(
    x: Tensor, w: dict[str, Tensor], cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values [batch, seq, heads, head_dim]; K = V where there is no v_proj."""
    batch, seq, _ = x.shape
    dim = cos.shape[-1]
    normed = rms(x, w["input_layernorm.weight"])
    q = linear(normed, w["self_attn.q_proj.weight"]).view(batch, seq, -1, dim)
    k = linear(normed, w["self_attn.k_proj.weight"]).view(batch, seq, -1, dim)
    v_weight = w.get("self_attn.v_proj.weight")
    v = k if v_weight is None else linear(normed, v_weight).view(batch, seq, -1, dim)
    q = rope(rms(q, w["self_attn.q_norm.weight"]), cos, sin)
    k = rope(rms(k, w["self_attn.k_norm.weight"]), cos, sin)
    return q.bfloat16(), k.bfloat16(), rms(v).bfloat16()


@torch.compile(dynamic=False)
def window_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention to the last WINDOW tokens, in blocks: a block sees itself and the one before."""
    batch, seq, heads, dim = q.shape
    kv_heads, blocks = k.shape[2], seq // WINDOW
    groups = heads // kv_heads
    q = q.view(batch, blocks, WINDOW, kv_heads, groups, dim).permute(0, 1, 3, 4, 2, 5)
    q = q.reshape(-1, groups * WINDOW, dim)

    def with_previous(t: Tensor) -> Tensor:
        t = t.view(batch, blocks, WINDOW, kv_heads, dim).permute(0, 1, 3, 2, 4)
        before = F.pad(t[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        return torch.cat((before, t), 3).reshape(-1, 2 * WINDOW, dim)

    scores = torch.bmm(q, with_previous(k).transpose(1, 2)).float()
    scores = scores.view(batch, blocks, kv_heads, groups, WINDOW, 2 * WINDOW) + bias
    probs = scores.softmax(-1).bfloat16().view(-1, groups * WINDOW, 2 * WINDOW)
    out = torch.bmm(probs, with_previous(v))
    out = out.view(batch, blocks, kv_heads, groups, WINDOW, dim).permute(0, 1, 4, 2, 3, 5)
    return out.reshape(batch, seq, heads * dim)


@lru_cache
def window_bias(blocks: int) -> Tensor:
    """0 where a query may look and -inf elsewhere: [blocks, 1, 1, WINDOW, 2 * WINDOW]."""
    query = torch.arange(WINDOW)[:, None] + WINDOW
    key = torch.arange(2 * WINDOW)[None]
    allowed = (key <= query) & (query - key < WINDOW)
    bias = torch.zeros(blocks, WINDOW, 2 * WINDOW).masked_fill_(~allowed, -torch.inf)
    bias[0, :, :WINDOW] = -torch.inf
    return bias[:, None, None]


def global_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k.expand_as(q), v.expand_as(q), is_causal=True, scale=1.0
    )
    return out.transpose(1, 2).flatten(2)


@torch.compile(dynamic=False)
def after_attention(
    x: Tensor, attended: Tensor, w: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual, the dense MLP's share and the experts' input."""
    out = linear(attended, w["self_attn.o_proj.weight"])
    x = x + rms(out, w["post_attention_layernorm.weight"])
    h = rms(x, w["pre_feedforward_layernorm.weight"])
    gate = F.gelu(linear(h, w["mlp.gate_proj.weight"]).float(), approximate="tanh")
    h = gate * linear(h, w["mlp.up_proj.weight"])
    dense = rms(linear(h, w["mlp.down_proj.weight"]), w["post_feedforward_layernorm_1.weight"])
    return x, dense, rms(x, w["pre_feedforward_layernorm_2.weight"]).bfloat16().flatten(0, 1)


@torch.compile(dynamic=True)
def expert_act(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return (F.gelu(gate.float(), approximate="tanh") * up.float()).bfloat16()


@torch.compile(dynamic=False)
def combine(x: Tensor, dense: Tensor, out: Tensor, top: Tensor, w: dict[str, Tensor]) -> Tensor:
    moe = (out.float() * top[..., None]).sum(1).view_as(x)
    both = dense + rms(moe, w["post_feedforward_layernorm_2.weight"])
    return x + rms(both, w["post_feedforward_layernorm.weight"])


def experts(x: Tensor, w: dict[str, Tensor], chosen: Tensor) -> Tensor:
    """Each token through its chosen experts, [num_tokens, top_k, hidden].

    Every expert gets as many slots as the busiest one needs, so two batched products do it all.
    """
    num_tokens = chosen.shape[0]
    flat = chosen.flatten()  # [num_tokens * top_k]
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=NUM_EXPERTS)
    capacity = -(-int(counts.max()) // 64) * 64
    expert = flat[order]
    slot = torch.empty_like(order)
    slot[order] = expert * capacity + torch.arange(len(flat)) - (counts.cumsum(0) - counts)[expert]
    source = torch.full((NUM_EXPERTS * capacity,), len(flat))
    source[slot] = torch.arange(len(flat))
    token = torch.where(source < len(flat), source // TOP_K, num_tokens)
    rows = gather(x, token, slot, TOP_K).view(NUM_EXPERTS, capacity, -1)
    gate_up = torch.bmm(rows, w["experts.gate_up_proj"].bfloat16().transpose(1, 2))
    out = torch.bmm(expert_act(gate_up), w["experts.down_proj"].bfloat16().transpose(1, 2))
    return gather(out.flatten(0, 1), slot, source, 1).view(num_tokens, TOP_K, -1)
