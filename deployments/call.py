"""A call that was let in: whose it is, its id, how long it may take."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.tenancy import Lease


@dataclass(slots=True)
class Call:
    """What gRPC and HTTP tell the methods behind them of a call."""

    lease: Lease
    timeout_s: float | None = None  # what the client gave it at the start; None: no limit
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.monotonic)

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
    return key.strip() if scheme.lower() == "bearer" else header("x-api-key")
