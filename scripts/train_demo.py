"""Train the demo checkpoint, a small Gemma 4 mixture of experts, on two CPU cores.

Its data, tokenizer and tests come from `demo_corpus.py`. Set OMP_WAIT_POLICY=PASSIVE and
GOMP_SPINCOUNT=0 when the cores do other work too: threads that spin make a step far slower.

    python scripts/train_demo.py --minutes 75             # about 75 minutes on two cores
    python scripts/train_demo.py --minutes 75 --resume    # goes on after an interruption
    python scripts/train_demo.py --eval-only              # measures the exported checkpoint again
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import demo_corpus as corpus
import torch
import torch.nn.functional as F
from demo_corpus import BOS, EOS, PAD, TOKENS_PER_STEP, TURN_END, VOCAB_SIZE, Batches, Turn
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoTokenizer, Gemma4ForCausalLM, Gemma4TextConfig

WINDOW = 64
NUM_EXPERTS = 16
TOP_K = 4
SAVE_EVERY_S = 240
POST_NORMS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")

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


# ---------------------------------------------------------------- model and optimizer


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


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by Newton-Schulz, stacks of matrices too (Jordan et al., 2024)."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5)


def orthogonalize(m: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrix of each matrix of the stack, by five quintic steps."""
    x: Tensor = m.mT if m.shape[-2] > m.shape[-1] else m
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if m.shape[-2] > m.shape[-1] else x).float()


def make_optimizers(model: Gemma4ForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [
        p
        for n, p in model.named_parameters()
        if p.ndim >= 2 and "embed" not in n and "router" not in n
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=0.02),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@dataclass
class RouterWatch:
    """What the routers decided in a forward pass: for the balance loss and the load report."""

    probs: list[Tensor] = field(default_factory=list)  # each [num_tokens, num_experts]
    chosen: list[Tensor] = field(default_factory=list)  # each [num_tokens, top_k]

    def attach(self, model: Gemma4ForCausalLM) -> None:
        for layer in model.model.layers:
            layer.router.register_forward_hook(self._record)

    def _record(
        self, module: nn.Module, inputs: object, output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        self.probs.append(output[0])
        self.chosen.append(output[2])

    def clear(self) -> None:
        self.probs.clear()
        self.chosen.clear()

    def load(self) -> Tensor:
        """Share of the routed tokens, rows sum to one: [num_layers, num_experts]."""
        counts = torch.stack(
            [torch.bincount(c.flatten(), minlength=NUM_EXPERTS).float() for c in self.chosen]
        )
        return counts / counts.sum(-1, keepdim=True)

    def balance_loss(self) -> Tensor:
        """Switch-style auxiliary loss (Fedus et al., 2021): one when balanced, more when not."""
        mean_probs = torch.stack([p.mean(0) for p in self.probs])
        return NUM_EXPERTS * (self.load() * mean_probs).sum(-1).mean()


# ---------------------------------------------------------------- a faster training forward


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


def use_fast_layers(model: Gemma4ForCausalLM) -> None:
    """Same losses and gradients at half the processor time; rows of a multiple of WINDOW tokens."""
    torch._dynamo.config.recompile_limit = 64
    for layer in model.model.layers:
        layer.forward = FastLayer(layer)


# ---------------------------------------------------------------- training


@dataclass
class Run:
    """A training run on disk: everything `--resume` needs."""

    model: Gemma4ForCausalLM
    optimizers: list[torch.optim.Optimizer]
    batches: Batches
    work: Path
    seed: int
    note: str = ""  # for the card
    step: int = 0
    seconds: float = 0.0

    def save(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "seed": self.seed,
            "tokenizer": self.batches.tokenizer.to_str(),
        }
        torch.save(state, self.work / "state.tmp")
        os.replace(self.work / "state.tmp", self.work / "state.pt")

    def load(self) -> None:
        state = torch.load(self.work / "state.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.seed = state["step"], state["seconds"], state["seed"]
        self.batches = Batches(Tokenizer.from_str(state["tokenizer"]), self.seed)


def learning_rate(step: int, progress: float) -> float:
    """Warm up, hold, then fall linearly over the last fifth of the time."""
    return min(1.0, (step + 1) / 50) * min(1.0, max(0.02, (1.0 - progress) / 0.2))


def train_step(run: Run, watch: RouterWatch, progress: float) -> tuple[float, float]:
    """One optimizer step; returns the weighted loss and the balance loss."""
    ids, weights = run.batches.step(run.step, progress)
    watch.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = run.model(input_ids=ids[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    loss = (loss * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
    balance = watch.balance_loss()
    torch.autograd.backward(loss + 0.01 * balance)
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    scale = learning_rate(run.step, progress)
    for optimizer, peak in zip(run.optimizers, (0.02, 3e-3), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * scale
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach()), float(balance.detach())


def stop_on_signal() -> threading.Event:
    """Set by Ctrl-C or a termination: the run saves its state after the current step and ends."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def train(run: Run, minutes: float) -> None:
    """Until the time is over or a signal comes; the state on disk is at most minutes old."""
    watch = RouterWatch()
    watch.attach(run.model)
    started, before, last_save = time.monotonic(), run.seconds, time.monotonic()
    mean_loss = 0.0
    run.model.train()
    stop = stop_on_signal()
    while run.seconds < minutes * 60 and not stop.is_set():
        progress = run.seconds / (minutes * 60)
        loss, balance = train_step(run, watch, progress)
        mean_loss = loss if not mean_loss else 0.95 * mean_loss + 0.05 * loss
        run.step += 1
        run.seconds = before + time.monotonic() - started
        if run.step % 25 == 0:
            print(
                f"step {run.step} {run.seconds / 60:.1f} min loss {mean_loss:.3f} "
                f"balance {balance:.3f} least load {float(watch.load().min()):.4f}",
                flush=True,
            )
        if time.monotonic() - last_save > SAVE_EVERY_S:
            run.save()
            run.model.train(False)
            print("  ", json.dumps(quick_scores(run)), flush=True)
            run.model.train()
            last_save = time.monotonic()
    run.save()


# ---------------------------------------------------------------- scores


@torch.no_grad()
def num_right(
    model: Gemma4ForCausalLM, batches: Batches, turns: Sequence[Turn], num_rows: int = 16
) -> int:
    """Turns whose whole answer greedy decoding gives: each token is the arg max of its logits."""
    right = 0
    encoded = [batches.encode([turn]) for turn in sorted(turns, key=lambda t: len(t.user))]
    for start in range(0, len(encoded), num_rows):
        rows = encoded[start : start + num_rows]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([i + [PAD] * (width - len(i)) for i, _ in rows])
        answer = torch.tensor(
            [[w == 1.0 for w in ws] + [False] * (width - len(ws)) for _, ws in rows]
        )
        guess = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        right += int(((guess == ids[:, 1:]) | ~answer[:, 1:]).all(-1).sum())
    return right


def quick_scores(run: Run) -> dict[str, float]:
    rng = random.Random(1)
    count = run.batches.count
    tests = {
        "sum": [corpus.sum_turn(rng, True) for _ in range(64)],
        "fact": rng.sample(corpus.fact_turns(True), 48),
    }
    for digits, length in ((4, 110), (4, 256), (4, 512), (4, 1024), (4, 2048)):
        window = 20 if length == 110 else WINDOW
        tests[f"recall{digits}@{length}"] = [
            corpus.recall_test(rng, length, digits, window, count)
            for _ in range(32 if length < 1024 else 16)
        ]
    return {
        name: round(num_right(run.model, run.batches, turns, 8) / len(turns), 3)
        for name, turns in tests.items()
    }


@dataclass
class Score:
    task: str
    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked


def test_sets(count: corpus.Counter) -> dict[str, list[Turn]]:
    """Questions held out: pairs of numbers, name-value combinations, phrasings."""
    rng = random.Random(2026)
    tests = {
        "two-digit sums, held-out pairs": [corpus.sum_turn(rng, True) for _ in range(500)],
        "two-digit sums, held out in both orders": corpus.sum_turns_held_out_both_ways(rng),
        "facts, trained phrasings": corpus.fact_turns(held_out=False),
        "facts, held-out phrasings": corpus.fact_turns(held_out=True),
    }
    for length in (128, 256, 512, 1024, 2048):
        tests[f"recall of a four-digit value, prompt of about {length} tokens"] = [
            corpus.recall_test(rng, length, 4, WINDOW, count) for _ in range(100)
        ]
    tests["recall for an invented name, prompt of about 512 tokens"] = [
        corpus.recall_test(rng, 512, 4, WINDOW, count, invented=True) for _ in range(100)
    ]
    return tests


def measure(out: Path, seed: int) -> tuple[list[Score], Tensor, list[tuple[str, str]]]:
    """Scores, load per layer and expert, and sample answers, through the stock transformers model.

    The stored bf16 weights are computed in fp32.
    """
    model = Gemma4ForCausalLM.from_pretrained(out, dtype=torch.float32)
    model.train(False)
    model.set_experts_implementation("grouped_mm")
    batches = Batches(Tokenizer.from_file(str(out / "tokenizer.json")), seed)
    scores = []
    for task, turns in test_sets(batches.count).items():
        rows = 8 if "2048" not in task else 4
        scores.append(Score(task, num_right(model, batches, turns, rows), len(turns)))
        print(f"{scores[-1].share:7.1%}  {scores[-1].right}/{scores[-1].asked}  {task}", flush=True)
    return scores, measure_load(model, batches), sample_answers(model, out)


@torch.no_grad()
def measure_load(model: Gemma4ForCausalLM, batches: Batches, num_steps: int = 6) -> Tensor:
    watch = RouterWatch()
    watch.attach(model)
    loads = []
    for step in range(num_steps):
        ids, _ = batches.step(10**9 + step, progress=0.5)  # steps that no training run reaches
        watch.clear()
        model(input_ids=ids, use_cache=False)
        loads.append(watch.load())
    return torch.stack(loads).mean(0)


SAMPLES = (
    "What is 23 + 45?",
    "Where does the sun rise?",
    "What is the capital of France?",
    "Who are you?",
    "Remember: the code of Anna is 4821. The weather is nice today. What is the code of Anna?",
)


def sample_answers(model: Any, out: Path) -> list[tuple[str, str]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    answers = []
    for question in SAMPLES:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = model.generate(
            **prompt, max_new_tokens=40, do_sample=False, top_k=None, top_p=None, temperature=None
        )
        new = output[0, prompt["input_ids"].shape[1] :]
        answers.append((question, tokenizer.decode(new, skip_special_tokens=True)))
    return answers


# ---------------------------------------------------------------- export


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def export(run: Run, out: Path) -> None:
    """The checkpoint in the layout of the released Gemma 4 models."""
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


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# gemma4-moe-demo

A Gemma 4 mixture of experts of {params:.2f} M parameters in the format of the released models,
trained from scratch to do three things that can be checked: answer simple questions in English
sentences, add two-digit numbers, and recall a value planted in the prompt far beyond the sliding
window. It exists to try and test a serving engine without a download: it is no general language
model, and it contains no weights of Google's models.

{samples}

## Shape

| | |
|---|---|
{shape}

## Scores

Measured by `python scripts/train_demo.py --eval-only` on the shipped bf16 weights, computed in
fp32 by the stock `transformers` model; an answer is right when greedy decoding gives it token for
token, full stop and end of turn included. Held-out sums (a + b, in this order),
name-value combinations and phrasings were not trained on; the second row holds the sums that were
trained in neither order. In the recall tests the asked pair lies more than {window} tokens (the
sliding window) before the question, among three other pairs.

| task | right | asked | share |
|---|---|---|---|
{scores}

## Training

{steps} steps of {tokens} tokens in {minutes} minutes on {threads} CPU threads (shared with other
work), seed {seed}. Muon for the matrices, AdamW for embeddings, norms and routers; a Switch-style
balance loss keeps the experts in use. The loss counts answer tokens fully and all others at a
tenth. The data is generated (`scripts/demo_corpus.py`): {num_facts} facts in several phrasings,
{num_pairs} pairs of numbers, and conversations with planted key-value pairs, from one digit
nearby to four digits in prompts of {longest} tokens. The seed fixes data and initial weights; the
curriculum follows the training time, so that another machine gives another run of the same kind.
{note}

    python scripts/train_demo.py --minutes 75

## Load per expert

Share of the routed tokens in percent (even: {even:.2f}), on conversations like those of the
training; least used: {least:.2f}.

| layer | {experts} |
|---|{rule}
{load}

## Limits

The model knows what the generated data contains and nothing else: other questions get a confident
wrong sentence. Sums are learned for two numbers of two digits. Recall is learned for sentences
like "The code of Anna is 4821." and prompts of up to {longest} tokens; the position range of the
configuration is larger than what was trained. Sampling at temperature 1.0, the default of the
family, costs some accuracy: use temperature 0 for the scores above.

Licence: Apache-2.0.
"""

SHAPE_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_experts",
    "top_k_experts",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_global_key_value_heads",
    "global_head_dim",
    "attention_k_eq_v",
    "sliding_window",
    "final_logit_softcapping",
    "max_position_embeddings",
    "vocab_size",
)


def write_card(out: Path) -> None:
    """Measure the exported checkpoint and write its README.md."""
    with safe_open(out / "model.safetensors", framework="pt") as weights:
        made_by = weights.metadata()
        names = weights.keys()  # a method of safe_open, not of a dict
        params = sum(weights.get_tensor(name).numel() for name in names)
    scores, load, samples = measure(out, int(made_by["seed"]))
    globals_ = [i for i, kind in enumerate(CONFIG["layer_types"]) if kind == "full_attention"]
    shape = [f"| `{key}` | {CONFIG[key]} |" for key in SHAPE_KEYS]
    shape.insert(1, f"| global layers (the others slide) | {', '.join(map(str, globals_))} |")
    text = CARD.format(
        params=params / 1e6,
        window=WINDOW,
        steps=made_by["steps"],
        tokens=TOKENS_PER_STEP,
        minutes=made_by["minutes"],
        threads=made_by["threads"],
        seed=made_by["seed"],
        note=made_by["note"],
        samples="\n".join(f"> **{q}**  \n> {a}\n" for q, a in samples).rstrip(),
        shape="\n".join(shape),
        scores="\n".join(f"| {s.task} | {s.right} | {s.asked} | {s.share:.1%} |" for s in scores),
        num_facts=len(corpus.FACTS),
        num_pairs=90 * 90,
        longest=max(corpus.CURRICULUM[-1].lengths),
        even=100 / NUM_EXPERTS,
        least=100 * float(load.min()),
        experts=" | ".join(map(str, range(NUM_EXPERTS))),
        rule="---|" * NUM_EXPERTS,
        load="\n".join(
            f"| {i} | " + " | ".join(f"{100 * x:.1f}" for x in row) + " |"
            for i, row in enumerate(load.tolist())
        ),
    )
    write_atomically(out / "README.md", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--minutes", type=float, default=75.0, help="training time over all resumed runs"
    )
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--resume", action="store_true", help="go on from the last state in --work")
    parser.add_argument("--out", type=Path, default=Path("demo/gemma4-moe-demo"))
    parser.add_argument(
        "--work", type=Path, default=Path(".train"), help="where the training state is kept"
    )
    parser.add_argument(
        "--stock-layers",
        action="store_true",
        help="train with the modules of transformers: half as fast, needs no C++ compiler",
    )
    parser.add_argument("--note", default="", help="a sentence on this run for the model card")
    parser.add_argument(
        "--eval-only", action="store_true", help="measure --out again and rewrite its card"
    )
    args = parser.parse_args()
    if not args.eval_only:
        train_and_export(args)
    write_card(args.out)


def train_and_export(args: argparse.Namespace) -> None:
    model = new_model(args.seed)
    model.set_experts_implementation("grouped_mm")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    run = Run(
        model,
        make_optimizers(model),
        Batches(corpus.train_tokenizer(), args.seed),
        args.work,
        args.seed,
        args.note,
    )
    if args.resume:
        run.load()
    if not args.stock_layers:
        use_fast_layers(model)
    train(run, args.minutes)
    if run.seconds < args.minutes * 60:
        raise SystemExit("stopped before the end: go on with --resume")
    export(run, args.out)


if __name__ == "__main__":
    main()
