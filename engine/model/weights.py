"""Places the tensors that the attention side owns; the experts' are never read here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from cluster.checkpoint import Checkpoint
from cluster.spec import ModelSpec

Progress = Callable[[int, int], None]  # (bytes placed so far, bytes in all)


class Weights(Protocol):
    """Where a decoder's tensors come from: a checkpoint, or a generator of random ones."""

    def tensor(self, name: str, *shape: int) -> Tensor:
        """A tensor by its checkpoint name, in the decoder's dtype and on its device."""
        ...

    def rows(self, *parts: tuple[str, int], columns: int) -> Tensor:
        """Matrices (name, rows) of equal width, one below the other, as one [sum of rows, columns].

        Their product with x is then one GEMM.
        """
        ...

    def vectors(self, *parts: tuple[str, int]) -> Tensor:
        """Vectors (name, length), one after the other."""
        ...


class CheckpointWeights:
    """Reads from a checkpoint, tensor by tensor: beside the model, one is in memory at a time.

    Raises CheckpointError, naming the tensor, for one that is missing or has a wrong shape.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str,
        dtype: torch.dtype,
        on_progress: Progress | None = None,
        total_bytes: int = 0,
    ) -> None:
        self._checkpoint, self._device, self._dtype = checkpoint, device, dtype
        self._on_progress = on_progress
        self._placed_bytes, self._total_bytes = 0, total_bytes

    def tensor(self, name: str, *shape: int) -> Tensor:
        placed = torch.empty(shape, dtype=self._dtype, device=self._device)
        self._place(placed, name)
        return placed

    def rows(self, *parts: tuple[str, int], columns: int) -> Tensor:
        num_rows = sum(rows for _, rows in parts)
        placed = torch.empty((num_rows, columns), dtype=self._dtype, device=self._device)
        for part, (name, _) in zip(torch.split(placed, [n for _, n in parts]), parts, strict=True):
            self._place(part, name)
        return placed

    def vectors(self, *parts: tuple[str, int]) -> Tensor:
        return torch.cat([self.tensor(name, length) for name, length in parts])

    def _place(self, destination: Tensor, name: str) -> None:
        destination.copy_(self._checkpoint.read(name, tuple(destination.shape)))
        if self._on_progress is not None:
            self._placed_bytes += destination.numel() * destination.element_size()
            self._on_progress(self._placed_bytes, max(self._placed_bytes, self._total_bytes))


def decoder_bytes(spec: ModelSpec, checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of the text decoder's tensors in `dtype` without the experts'."""
    num_elements = sum(
        torch.Size(checkpoint.shape(name)).numel()
        for name in checkpoint.keys()  # noqa: SIM118 - a Checkpoint is no dict
        if name.startswith((spec.tensor_prefix, "lm_head.")) and ".experts." not in name
    )
    return num_elements * dtype.itemsize
