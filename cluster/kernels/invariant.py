"""Arithmetic whose result for a row never depends on the other rows, for batch_invariant mode.

A GEMM library picks its kernel by the number of rows, so a token's logits change in the last bits
with whatever shares its batch. Seen with MKL in fp32: rows differ at 1-3, 5-7 and 9-11 rows and
are bit-equal from 12 up, wherever the row stands and however many threads compute. So every product
here has at least TILE_ROWS rows; where that wasn't seen to be enough (other dtypes, GPUs), it is
computed in tiles of exactly TILE_ROWS rows. `check_invariance` tries it with the weights in use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from cluster.kernels.interface import Kernels

TILE_ROWS = 16
MANY_ROWS = 513  # of one step's batch, for the check
MOST_CHECKED = 1 << 24  # elements of a product; a bigger one (the logits) has few rows in a step


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias. Shapes: x [rows, in], weight [out, in], bias [out] -> [rows, out]."""
    num_rows = x.shape[0]
    if x.device.type == "cpu" and x.dtype is torch.float32:
        y = F.linear(_pad_rows(x, TILE_ROWS), weight)[:num_rows]
    else:
        y = _tiled_linear(x, weight)
    return y if bias is None else y + bias  # a fused bias would be one more kernel to trust


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up, elementwise, any shape.

    PyTorch's own gelu computes the last elements of a thread's share with another formula, so it
    depends on where an element stands; its tanh, products and sums don't.
    """
    inner = (gate * gate * gate * 0.044715 + gate) * math.sqrt(2 / math.pi)
    return (torch.tanh(inner) + 1) * gate * 0.5 * up


def check_invariance(kernels: Kernels, weights: Iterable[Tensor]) -> None:
    """Try the kernels' `linear` with one weight of each shape, in batches of several sizes.

    Raises ConfigError when a row's bits depend on the batch on this machine.
    """
    for weight in {weight.shape: weight for weight in weights}.values():
        _check_weight(kernels, weight)


def _check_weight(kernels: Kernels, weight: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    num_rows = MANY_ROWS if MANY_ROWS * weight.shape[0] <= MOST_CHECKED else 3 * TILE_ROWS + 1
    x = torch.randn(num_rows, weight.shape[1], generator=generator)
    x, packed = x.to(weight), kernels.pack(weight)
    expected = torch.cat([kernels.linear(tile, packed) for tile in torch.split(x, TILE_ROWS)])
    for start, stop in ((0, 1), (5, 7), (9, 12), (30, 39), (0, 17), (3, 40), (0, 49), (0, len(x))):
        y = kernels.linear(x[start:stop], packed)
        if not torch.equal(y, expected[start:stop]):
            raise ConfigError(
                f"batch_invariant can't be kept on this machine: a product with a {weight.dtype} "
                f"weight of shape {tuple(weight.shape)} on {weight.device} changes with the number "
                "of rows. Turn batch_invariant off."
            )


def _tiled_linear(x: Tensor, weight: Tensor) -> Tensor:
    tiles = [F.linear(_pad_rows(tile, TILE_ROWS), weight) for tile in torch.split(x, TILE_ROWS)]
    return torch.cat(tiles)[: x.shape[0]] if tiles else F.linear(x, weight)


def _pad_rows(x: Tensor, num_rows: int) -> Tensor:
    missing = num_rows - x.shape[0]
    return F.pad(x, (0, 0, 0, missing)) if missing > 0 else x
