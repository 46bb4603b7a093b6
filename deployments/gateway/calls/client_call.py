"""A client's call that was admitted: its tenant, its id, how long it may take, what it has cost."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from cluster.errors import BrioletteError, DeadlineExceeded
from cluster.tenants.admission import Lease
from protos.briolette.v1.inference_pb2 import (
    FINISH_REASON_UNSPECIFIED,
    Generation,
    Timings,
    Usage,
)
from protos.briolette.v1.stream_pb2 import Add

GRACE_S = 1.0  # a decoder that is well notices a deadline first

T = TypeVar("T")


def new_request_id() -> str:
    """Return a new id, which the call's client sees and every log shows."""
    return uuid.uuid4().hex


@dataclass(slots=True)
class CallStats:
    """What a call has received so far, for the log; its answers add up."""

    model: str = ""  # empty: the call generates nothing
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)  # of the answer that began or ended last


@dataclass(slots=True)
class ClientCall:
    """What gRPC and HTTP tell the methods behind them about a call."""

    lease: Lease
    timeout_s: float | None = None  # from the start; None: no limit
    request_id: str = field(default_factory=new_request_id)
    started_at: float = field(default_factory=time.monotonic)
    stats: CallStats = field(default_factory=CallStats)
    _ttfts_s: dict[str, float] = field(default_factory=dict)  # by the answers that have begun

    @property
    def tenant(self) -> str:
        """Name of the tenant."""
        return self.lease.tenant.name

    @property
    def time_remaining_s(self) -> float | None:
        """Seconds until the client's deadline; None without one."""
        if self.timeout_s is None:
            return None
        return self.started_at + self.timeout_s - time.monotonic()

    async def in_time(self, work: Awaitable[T]) -> T:
        """Return what `work` brings. Raises DeadlineExceeded, also where the decoder is silent."""
        if self.time_remaining_s is None:
            return await work
        try:
            async with asyncio.timeout(self.time_remaining_s + GRACE_S):
                return await work
        except TimeoutError:
            raise DeadlineExceeded("The deadline passed before the answer was complete.") from None

    def begin(self, model: str, num_prompt_tokens: int) -> None:
        """Note that the decoder is asked, for answers to prompts of so many tokens."""
        self.stats.model = model
        self.stats.usage.prompt_tokens += num_prompt_tokens

    def record(self, add: Add, piece: Generation) -> None:
        """Count a piece of the answer to `add`.

        Its first piece is given the request's id, its last one the times since the call's start.
        """
        elapsed_s = time.monotonic() - self.started_at
        if (ttft_s := self._ttfts_s.get(add.request_id)) is None:
            ttft_s = self._ttfts_s[add.request_id] = elapsed_s
            piece.request_id = add.request_id
        if piece.finish_reason != FINISH_REASON_UNSPECIFIED:
            piece.timings.ttft_s, piece.timings.total_s = ttft_s, elapsed_s
        self.stats.usage.output_tokens += len(piece.token_ids)
        if not add.same_prompt:
            self.stats.usage.cached_tokens += piece.usage.cached_tokens
        self.stats.timings.MergeFrom(piece.timings)
        self.stats.timings.ttft_s = ttft_s

    @contextmanager
    def charged(self, num_prompt_tokens: int) -> Iterator[Callable[[Generation], None]]:
        """Charge the tenant for the call's prompts, around all of its answers.

        Yields the function that charges for a piece of an answer. The prompts are refunded if the
        cluster was unavailable before any piece came.

        Raises:
            DeadlineExceeded: no time is left.
            QuotaExceeded: the tenant's tokens per minute are used up.
            InvalidRequest: the prompts exceed what the tenant has in a minute.
        """
        is_begun = False

        def charge(piece: Generation) -> None:
            nonlocal is_begun
            is_begun = True
            self.lease.charge_output(len(piece.token_ids))

        if self.time_remaining_s is not None and self.time_remaining_s <= 0:
            raise DeadlineExceeded("The deadline passed before the answer could begin.")
        self.lease.charge(num_prompt_tokens)
        try:
            yield charge
        except BrioletteError as error:
            if error.status == "UNAVAILABLE" and not is_begun:
                self.lease.refund(num_prompt_tokens)
            raise


def key_in(header: Callable[[str], str | None]) -> str | None:
    """Return the API key of a call: `authorization: Bearer KEY` or `x-api-key: KEY`.

    Args:
        header: looks up a header by its name in lower case.
    """
    scheme, _, key = (header("authorization") or "").partition(" ")
    return (scheme.lower() == "bearer" and key.strip()) or header("x-api-key")
