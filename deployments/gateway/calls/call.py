"""A call that was let in: whose it is, its id, how long it may take."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.tenants.admission import Lease
from protos.briolette.v1.inference_pb2 import Generation, Timings, Usage


def new_request_id() -> str:
    """What a call is found by: its client sees it, and every log has it."""
    return uuid.uuid4().hex


@dataclass(slots=True)
class Answered:
    """What a call has got so far, for the log; several answers to it add up."""

    model: str = ""  # that generates; empty: none does
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)  # of the last one that began or ended

    def begin(self, model: str, num_prompt_tokens: int) -> None:
        """An answer is asked of the decoder; no prompt tokens where it shares another's prompt."""
        self.model = model
        self.usage.prompt_tokens += num_prompt_tokens

    def add(self, piece: Generation, ttft_s: float, same_prompt: bool = False) -> None:
        """A piece of an answer is on its way to the client."""
        self.usage.output_tokens += len(piece.token_ids)
        if not same_prompt:
            self.usage.cached_tokens += piece.usage.cached_tokens  # in the last piece
        self.timings.MergeFrom(piece.timings)
        self.timings.ttft_s = ttft_s


@dataclass(slots=True)
class Call:
    """What gRPC and HTTP tell the methods behind them of a call."""

    lease: Lease
    timeout_s: float | None = None  # what the client gave it at the start; None: no limit
    request_id: str = field(default_factory=new_request_id)
    started: float = field(default_factory=time.monotonic)
    answered: Answered = field(default_factory=Answered)

    @property
    def tenant(self) -> str:
        """The name."""
        return self.lease.tenant.name

    @property
    def time_remaining_s(self) -> float | None:
        """Of the client's deadline."""
        if self.timeout_s is None:
            return None
        return self.started + self.timeout_s - time.monotonic()


def key_in(header: Callable[[str], str | None]) -> str | None:
    """The API key that a call shows: `authorization: Bearer KEY` or `x-api-key: KEY`. `header`
    looks one up by its name in small letters.
    """
    scheme, _, key = (header("authorization") or "").partition(" ")
    return (scheme.lower() == "bearer" and key.strip()) or header("x-api-key")
