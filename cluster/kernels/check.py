"""A check, when weights are loaded, that this machine's products keep batch_invariant."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cluster.errors import ConfigError
from cluster.kernels.interface import Kernels
from cluster.kernels.invariant import TILE_ROWS

MANY_ROWS = 513  # tokens of a large step
MAX_ELEMENTS = 1 << 24  # of a product; a larger one (the logits) has few tokens in a step


def check_invariance(kernels: Kernels, weights: Iterable[Tensor]) -> None:
    """Try the kernels' `linear` with one weight of each shape, in batches of several sizes.

    Raises:
        ConfigError: the bits of a row depend on the batch on this machine.
    """
    for weight in {weight.shape: weight for weight in weights}.values():
        _check_weight(kernels, weight)


def _check_weight(kernels: Kernels, weight: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    num_rows = MANY_ROWS if MANY_ROWS * weight.shape[0] <= MAX_ELEMENTS else 3 * TILE_ROWS + 1
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
