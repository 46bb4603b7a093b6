"""Weights packed once for products on a CPU: oneDNN's layout, which suits few rows and many.

Measured with fp32 weights of 256 x 1024 on one thread of a Zen 4, in microseconds per product:
1 row 122 plain and 90 packed, 4 rows 192 and 79, 16 rows 259 and 136, 128 rows 848 and 657.
A row's bits depend on the number of rows, so batch_invariant mode can't use it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class PackedWeight:
    """A weight [out, in] that is only multiplied with; takes the plain tensor's place in memory."""

    __slots__ = ("_packed", "nbytes", "shape")

    def __init__(self, weight: Tensor) -> None:
        assert can_pack(weight)
        self.shape, self.nbytes = weight.shape, weight.nbytes
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x @ weight^T + bias. Shapes: x [rows, in], bias [out] -> [rows, out]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return y


def can_pack(weight: Tensor) -> bool:
    """Whether packing is known to pay for such a weight on this machine."""
    is_cpu_fp32 = weight.device.type == "cpu" and weight.dtype is torch.float32
    return is_cpu_fp32 and torch._C._has_mkldnn


def packed_or_plain(weight: Tensor) -> Tensor | PackedWeight:
    """The weight in the layout that multiplies faster here."""
    return PackedWeight(weight) if can_pack(weight) else weight


def multiply(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias in either layout."""
    if isinstance(weight, PackedWeight):
        return weight.linear(x, bias)
    return F.linear(x, weight, bias)
