"""Does the card compute what the CPU computes? Asked before any speed is measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.gpu_shapes import (
    CONFIG_DENSE,
    CONFIG_TINY,
    KeptCheckpoint,
    build_engine,
    random_prompts,
)
from bench.lib.card import Check
from cluster.kernels.interface import ExpertSlots
from cluster.kernels.torch_kernels import TorchKernels
from cluster.spec import ModelSpec
from engine.batch import Batch
from engine.core import EngineCore
from engine.request import SamplingParams
from experts.summation import reference_experts

FP32_TOLERANCE = 2e-3  # on logits within the softcap of 30, card against CPU
BF16_TOLERANCE = 3e-2  # relative, on one layer's experts against fp32
TOKEN_SHARE = 0.02  # of positions that a near-tie may decide otherwise


def check_correctness(device: torch.device) -> list[Check]:
    """The card against the CPU, with the same small random weights."""
    largest, tokens = moe_error(device)
    return [
        Check("fp32 logits: largest difference", largest, "", FP32_TOLERANCE, at_least=False),
        Check("fp32 tokens: share that differs", tokens, "", TOKEN_SHARE, at_least=False),
        Check("experts: error", experts_error(device), "", BF16_TOLERANCE, at_least=False),
        Check("bf16 logits: error", dense_error(device), "", BF16_TOLERANCE, at_least=False),
    ]


def moe_error(device: torch.device) -> tuple[float, float]:
    """A small mixture of experts in fp32, card against CPU: the largest difference of the first
    logits, and the share of greedy tokens that differ.
    """
    spec, checkpoint = ModelSpec.from_config(CONFIG_TINY), KeptCheckpoint()
    prompts = random_prompts(spec, 5, 40, seed=3)
    cpu, card = (
        greedy(build_engine(spec, checkpoint, where, torch.float32), prompts, 24)
        for where in (torch.device("cpu"), device)
    )
    largest = (cpu[1] - card[1]).abs().max().item()
    return largest, (cpu[0] != card[0]).float().mean().item()


def dense_error(device: torch.device) -> float:
    """bf16 against fp32, relative, with the 26B's head sizes; without experts, as rounding sends
    some tokens of a random mixture of experts elsewhere.
    """
    spec, checkpoint = ModelSpec.from_config(CONFIG_DENSE), KeptCheckpoint()
    prompts = random_prompts(spec, 2, 40, seed=4)
    exact, rounded = (
        greedy(build_engine(spec, checkpoint, device, dtype), prompts, 1)[1]
        for dtype in (torch.float32, torch.bfloat16)
    )
    return _relative_error(rounded, exact)


def greedy(engine: EngineCore, prompts: list[list[int]], num_tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens [num_prompts, num_tokens] and the logits of the step that gives each prompt's first.

    Later logits depend on the tokens chosen before, so only the first ones are compared.
    """
    kept = _KeepLogits(engine.runner)
    engine.runner = kept
    tokens: dict[str, list[int]] = {}
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        engine.add(request_id=f"check-{index}", prompt_ids=prompt, sampling=sampling)
        tokens[f"check-{index}"] = []
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            tokens[output.request_id] += output.new_token_ids
    return torch.tensor(list(tokens.values())), kept.first


def experts_error(device: torch.device) -> float:
    """The fast expert kernel (bf16 on a card) against the plain loop in fp32."""
    generator = torch.Generator().manual_seed(1)
    num_experts, hidden, inner, num_tokens, top_k = 16, 256, 64, 33, 4
    gate_up = torch.randn(num_experts, 2 * inner, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(num_experts, hidden, inner, generator=generator) * inner**-0.5
    x = torch.randn(num_tokens, hidden, generator=generator)
    weights, ids = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    gate_up, down, x = (t.to(device, dtype) for t in (gate_up, down, x))
    expected = reference_experts(x.float(), ids, weights.to(device), gate_up.float(), down.float())
    slots = ExpertSlots.from_topk(ids.to(device), weights.to(device))
    order = torch.argsort(slots.experts, stable=True)
    counts: list[int] = torch.bincount(slots.experts, minlength=num_experts).tolist()
    rows = TorchKernels().grouped_mlp(x[slots.tokens[order]], counts, gate_up, down)
    got = torch.zeros_like(expected)
    got.index_add_(0, slots.tokens[order], rows.float() * slots.weights[order].unsqueeze(1))
    return _relative_error(got, expected)


class _KeepLogits:
    """A runner that remembers the first logits of each of the first requests."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.first = torch.empty(0)

    def execute(self, batch: Batch) -> Tensor:
        logits: Tensor = self._runner.execute(batch)
        if not len(self.first):
            self.first = logits.float().cpu()
        return logits


def _relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())
