"""A KV projection that keys and values share (`attention_k_eq_v`): both from one cached tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from cluster.kernels.torch_kernels import rotate
from engine.attention.rotary import Rotary


@dataclass(frozen=True, slots=True)
class SharedKV:
    """Forms keys and values from what a layer caches: values, or the raw projection.

    K = rotate(weight * V). With raw projections V's norm is taken whenever it is read, by the
    operations that a separate cache runs when it writes, so that the bits are the same.
    """

    weight: Tensor  # [head_dim], of the k_norm
    rotary: Rotary
    eps: float | None = None  # of the norm of raw projections; None where values are cached

    @property
    def is_raw(self) -> bool:
        """True if raw projections are cached."""
        return self.eps is not None

    def keys(self, cached: Tensor, positions: Tensor) -> Tensor:
        """Form the keys of `cached` [num_kv_slots, num_kv_heads, head_dim], in the same shape.

        `positions` [num_kv_slots] are those of the cached tokens.
        """
        cos, sin = self.rotary(positions)
        return rotate(self.values(cached) * self.weight, cos, sin)

    def values(self, cached: Tensor) -> Tensor:
        """Form the values of `cached` [num_kv_slots, num_kv_heads, head_dim], in its shape."""
        return cached if self.eps is None else F.rms_norm(cached, cached.shape[-1:], None, self.eps)
