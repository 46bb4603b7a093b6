"""What the routers decide: for the balance loss and the load report."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import Gemma4ForCausalLM

from demo_model.shape import NUM_EXPERTS


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
