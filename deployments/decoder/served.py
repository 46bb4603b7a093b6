"""A request that is in the engine: where its answer goes, and what it has cost."""

from __future__ import annotations

from dataclasses import dataclass

from engine.request import Request
from protos.briolette.v1.inference_pb2 import Usage
from protos.briolette.v1.stream_pb2 import Spent


@dataclass(slots=True)
class Served:
    gateway_id: int
    request: Request
    same_prompt: bool  # another answer to the same call counts it
    same_call: bool
    queue_s: float | None = None  # until its first step
    saved_prefill_s: float = 0.0  # by what it found cached

    @property
    def spent(self) -> Spent:
        """What it has cost beside the call's other answers."""
        request = self.request
        usage = Usage() if self.same_prompt else self._prompt_usage
        usage.output_tokens = len(request.output_ids)
        return Spent(tenant=request.tenant, usage=usage, requests=0 if self.same_call else 1)

    @property
    def _prompt_usage(self) -> Usage:
        request = self.request
        num_reached = request.num_computed_tokens + len(request.output_ids)
        return Usage(
            prompt_tokens=min(len(request.prompt_ids), num_reached),
            cached_tokens=request.num_cached_tokens,
            fetched_tokens=request.num_fetched_tokens,
            saved_prefill_s=self.saved_prefill_s,
        )
