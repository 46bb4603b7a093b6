"""Rotary positions of one attention kind: cosines and sines, for a step's tokens or by table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.spec import RopeSpec

TABLE_STEP = 1 << 10  # positions; a table grows to twice its size, from this on


class Rotary:
    """Rotates the pairs (i, i + head_dim / 2) for i < num_rotating; the others stay still.

    Angles are position * frequency in fp32, so a position has the same bits wherever it is asked.
    """

    def __init__(
        self, rope: RopeSpec, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        num_rotating = int(rope.partial_rotary_factor * head_dim // 2)
        exponents = torch.arange(0, 2 * num_rotating, 2, dtype=torch.float32) / head_dim
        self.frequencies = (1.0 / rope.theta**exponents / rope.factor).to(device)
        self._half, self._dtype = head_dim // 2, dtype
        self._table = self._cos_sin(torch.arange(0, device=device))

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [num_tokens] -> cos, and sin with the first half negated, both
        [num_tokens, 1, head_dim]: what cluster.kernels.rotate wants.
        """
        num_still = self._half - len(self.frequencies)
        cos, sin = self._cos_sin(positions)
        cos, sin = F.pad(cos, (0, num_still), value=1.0), F.pad(sin, (0, num_still))
        return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]

    def table(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin of at least the first `num_positions`, [num_positions, num_rotating]."""
        size = len(self._table[0])
        if size < num_positions:
            while size < num_positions:
                size = max(TABLE_STEP, 2 * size)
            self._table = self._cos_sin(torch.arange(size, device=self.frequencies.device))
        return self._table

    def _cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None].float() * self.frequencies
        return angles.cos().to(self._dtype), angles.sin().to(self._dtype)
