"""Logits to compare: a sampler that records them, and the difference of two rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.request import Request
from engine.sampler import Sampler, SamplerOutput


class LogitsRecorder(Sampler):
    """A sampler that also keeps the logits of every token it samples."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: dict[str, list[Tensor]] = {}  # by request id; [vocab_size] each, on the CPU

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> SamplerOutput:
        for row, request in enumerate(requests):
            self.logits.setdefault(request.request_id, []).append(logits[row].cpu().clone())
        return super().sample(logits, requests)


def difference(ours: Tensor, reference: Tensor) -> float | None:
    """Compare two rows of logits bit by bit.

    Args:
        ours: fp32 [vocab_size].
        reference: fp32 [vocab_size].

    Returns:
        The largest difference, infinite where it is NaN; None if all bits are equal.
    """
    if torch.equal(ours.view(torch.int32), reference.view(torch.int32)):
        return None
    largest = float((ours - reference).abs().max())
    return torch.inf if largest != largest else largest
