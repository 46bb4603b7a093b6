"""Arithmetic whose result for a row never depends on the other rows, for batch_invariant mode.

A GEMM library picks its kernel by the number of rows, so a token's logits change in the last bits
with whatever shares its batch. Seen with MKL in fp32: rows differ at 1-3, 5-7 and 9-11 rows and
are bit-equal from 12 up, wherever the row stands and however many threads compute. So every product
here has at least TILE_ROWS rows; where that wasn't seen to be enough (other dtypes, GPUs), it is
computed in tiles of exactly TILE_ROWS rows. `cluster.kernels.check` tries it with the weights in
use.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_ROWS = 16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight^T + bias.

    Args:
        x: [num_rows, num_inputs].
        weight: [num_outputs, num_inputs].
        bias: [num_outputs].
    """
    num_rows = x.shape[0]
    if x.device.type == "cpu" and x.dtype is torch.float32:
        y = F.linear(_pad_rows(x, TILE_ROWS), weight)[:num_rows]
    else:
        y = _tiled_linear(x, weight)
    return y if bias is None else y + bias  # a fused bias would be one more kernel to trust


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """Return gelu_tanh(gate) * up, elementwise, any shape.

    PyTorch's own gelu computes the last elements of a thread's share with another formula, so it
    depends on where an element stands; its tanh, products and sums don't.
    """
    inner = (gate * gate * gate * 0.044715 + gate) * math.sqrt(2 / math.pi)
    return (torch.tanh(inner) + 1) * gate * 0.5 * up


def _tiled_linear(x: Tensor, weight: Tensor) -> Tensor:
    tiles = [F.linear(_pad_rows(tile, TILE_ROWS), weight) for tile in torch.split(x, TILE_ROWS)]
    return torch.cat(tiles)[: x.shape[0]] if tiles else F.linear(x, weight)


def _pad_rows(x: Tensor, num_rows: int) -> Tensor:
    missing = num_rows - x.shape[0]
    return F.pad(x, (0, 0, 0, missing)) if missing > 0 else x
