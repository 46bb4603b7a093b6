"""The expert load: how many tokens each expert of each layer got."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class ExpertLoad:
    """Counts tokens per layer and expert; one call costs one bincount.

    Not locked: a lost count under a race changes a statistic, never an answer.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.total = np.zeros((num_layers, num_experts), dtype=np.int64)

    def count(self, layer_idx: int, expert_ids: npt.NDArray[np.integer]) -> None:
        """Add one call's slots. Shape: expert_ids [num_slots], logical ids."""
        self.total[layer_idx] += np.bincount(expert_ids, minlength=self.total.shape[1])
