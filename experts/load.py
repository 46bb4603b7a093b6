"""The expert load window: how many tokens each expert of each layer got lately."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class ExpertLoad:
    """Counts tokens per layer and expert, over all time and over the current window.

    Counting one call costs one bincount; reading and rolling the window is for the control loop.
    Not locked: a lost count under a race changes a statistic, never an answer.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.total = np.zeros((num_layers, num_experts), dtype=np.int64)
        self._window_start = self.total.copy()

    def count(self, layer_idx: int, expert_ids: npt.NDArray[np.int64]) -> None:
        """Add one call's slots. Shape: expert_ids [num_slots], logical ids."""
        self.total[layer_idx] += np.bincount(expert_ids, minlength=self.total.shape[1])

    def window(self) -> npt.NDArray[np.int64]:
        """Tokens per layer and expert since `roll` was last called: [num_layers, num_experts]."""
        return self.total - self._window_start

    def roll(self) -> npt.NDArray[np.int64]:
        """Close the window: return its counts and start the next one."""
        counts = self.window()
        self._window_start = self._window_start + counts
        return counts
