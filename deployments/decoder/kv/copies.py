"""Blocks between the KV tensors and plain memory, on a CPU or a card.

In memory a block is one row of bytes: what each tensor of its kind holds of it, in the tensors'
order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)  # copying longer ones is faster
STAGED_BYTES = 32 << 20  # on the card, on the way into the tensors and out of them


class BlockCopier:
    """Reads and writes blocks of one kind in the tensors of all its layers, each
    [num_blocks, ...].
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._device = tensors[0].device
        row_bytes = [tensor[0].nbytes for tensor in tensors]
        self._word = next(w for w in WORDS if all(n % w.itemsize == 0 for n in row_bytes))
        # [num_blocks, words of a row]; shares memory with the tensors
        self._columns = [tensor.flatten(1).view(self._word) for tensor in tensors]
        self.block_bytes = sum(row_bytes)

    @property
    def layout(self) -> str:
        """What a row is made of."""
        return "+".join(str(column[0].nbytes) for column in self._columns)

    def memory(self, num_blocks: int) -> Tensor:
        """Rows of bytes [num_blocks, block_bytes] in plain memory."""
        shape = (num_blocks, self.block_bytes)
        if self._device.type == "cuda":
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        # numpy's large arrays are of huge pages: new memory costs a fifth of what torch's does.
        return torch.from_numpy(np.empty(shape, np.uint8))

    def read(self, block_ids: Sequence[int]) -> Tensor:
        """Rows of bytes [num_blocks, block_bytes] in plain memory; from a card they come with the
        stream, before anything that is asked of it later.
        """
        if self._device.type == "cpu":
            return self._gathered(block_ids).view(torch.uint8)
        memory = self.memory(len(block_ids))
        for part in self._parts(len(block_ids)):
            rows = self._gathered(block_ids[part])
            memory[part].view(self._word).copy_(rows, non_blocking=True)
        return memory

    def write(self, block_ids: Sequence[int], memory: Tensor, rows: Sequence[int]) -> None:
        """Fill blocks from some rows of memory; on a card before anything that is asked later."""
        for part in self._parts(len(block_ids)):
            self._scatter(block_ids[part], self._staged(memory, rows[part]))

    def _parts(self, num_blocks: int) -> Iterator[slice]:
        """So many blocks, a few at a time."""
        at_once = max(1, STAGED_BYTES // self.block_bytes)
        return (slice(first, first + at_once) for first in range(0, num_blocks, at_once))

    def _gathered(self, block_ids: Sequence[int]) -> Tensor:
        ids = torch.tensor(block_ids, device=self._device)
        return torch.cat([column.index_select(0, ids) for column in self._columns], 1)

    def _staged(self, memory: Tensor, rows: Sequence[int]) -> Tensor:
        """The rows on the tensors' device; a stretch of them isn't copied for that."""
        chosen = memory[_stretch(rows) or torch.tensor(rows)]
        return chosen.view(self._word).to(self._device, non_blocking=True)

    def _scatter(self, block_ids: Sequence[int], rows: Tensor) -> None:
        """A stretch of blocks, as a pool gives that nobody has used yet, takes half the time."""
        stretch = _stretch(block_ids)
        ids = torch.tensor(block_ids, device=self._device)
        first = 0
        for column in self._columns:
            part = rows[:, first : first + column.shape[1]]
            if stretch is not None:
                column[stretch].copy_(part)
            else:
                column.index_copy_(0, ids, part)
            first += column.shape[1]


def _stretch(numbers: Sequence[int]) -> slice | None:
    """The numbers as a slice, where each is one more than the one before."""
    stretch = range(numbers[0], numbers[0] + len(numbers))
    return slice(stretch.start, stretch.stop) if list(numbers) == list(stretch) else None


def as_bytes(memory: Tensor) -> memoryview:
    """Rows of plain memory as bytes that a socket can read or fill."""
    return memory.numpy().data.cast("B")
