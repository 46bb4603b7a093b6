"""A sampler that remembers what it saw, for those who compare logits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.request import Request
from engine.sampler import Sampler, SamplerOutput


class Recorder(Sampler):
    """Keeps the logits of each request until somebody takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: dict[str, list[Tensor]] = {}  # by request id; [vocab_size] each, on the CPU

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> SamplerOutput:
        for row, request in enumerate(requests):
            self.logits.setdefault(request.request_id, []).append(logits[row].cpu().clone())
        return super().sample(logits, requests)
