"""LocalExperts: the Experts protocol in this process, for one machine and as the last resort."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cluster.checkpoint import Checkpoint
from cluster.kernels.interface import ExpertSlots
from cluster.placement import ExpertGroups
from cluster.spec import ModelSpec
from experts.stats import ExpertLoad
from experts.summation import sum_partials
from experts.weights import load_experts


class LocalExperts:
    """Every expert of every layer in this process.

    `dispatch` computes at once and its handle is the result, so a forward pass never waits.
    """

    is_remote = False

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        groups: ExpertGroups,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        batch_invariant: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Read all experts; arguments and errors as in `load_experts`."""
        self._owned = load_experts(
            spec,
            checkpoint,
            groups,
            range(groups.num_groups),
            dtype=dtype,
            device=device,
            batch_invariant=batch_invariant,
            on_progress=on_progress,
        )
        self.load = ExpertLoad(spec.num_layers, spec.num_experts)

    def dispatch(
        self, layer_idx: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Tensor:
        """Compute a layer's experts.

        Args:
            layer_idx: of the experts.
            hidden_states: [num_tokens, hidden].
            topk_ids: [num_tokens, k] int64.
            topk_weights: [num_tokens, k].

        Returns:
            The handle for `combine`.
        """
        if not topk_ids.is_cuda:  # counting mustn't make a GPU wait
            self.load.count(layer_idx, topk_ids.reshape(-1).numpy())
        slots = ExpertSlots.from_topk(topk_ids, topk_weights)
        return sum_partials(self._owned.partials(layer_idx, hidden_states, slots))

    def combine(self, handle: Tensor) -> Tensor:
        """Return the routed experts' output: [num_tokens, hidden], dtype of the hidden states."""
        return handle

    def abandon(self, handle: Tensor) -> None:
        """Do nothing: the work is done."""
