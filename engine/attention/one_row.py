"""One row per token where K = V: what a layer keeps, and how keys and values come from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from cluster.kernels.torch_kernels import rotate
from engine.attention.rotary import Rotary


@dataclass(frozen=True, slots=True)
class OneRow:
    """K = rotate(weight * V), where the row is V or, with `eps`, the raw projection: V's norm is
    then taken whenever it is read, by the operations that a split cache runs when it writes.
    """

    weight: Tensor  # [head_dim], of the k_norm
    rotary: Rotary
    eps: float | None = None  # of the norm of raw rows

    @property
    def is_raw(self) -> bool:
        return self.eps is not None

    def keys(self, rows: Tensor, positions: Tensor) -> Tensor:
        """rows [num_rows, num_kv_heads, head_dim], positions [num_rows] -> the rows' shape."""
        return rotate(self.values(rows) * self.weight, *self.rotary(positions))

    def values(self, rows: Tensor) -> Tensor:
        """rows [num_rows, num_kv_heads, head_dim] -> the same shape."""
        return rows if self.eps is None else F.rms_norm(rows, rows.shape[-1:], None, self.eps)
