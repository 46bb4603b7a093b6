"""What gateways are told of the decoder, about once a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from deployments.decoder.engine import Engine
from deployments.decoder.meters import EngineMeter
from deployments.decoder.tenant_loads import TenantLoads
from deployments.messages import to_load
from engine.request import Request
from protos.briolette.v1.admin_pb2 import ClusterStatus, EngineLoad

PERIOD_S = 1.0


class LoopStatus:
    """The newest status, and when the next one is due."""

    def __init__(
        self,
        engine: Engine,
        meter: EngineMeter,
        tenants: TenantLoads,
        fill: Callable[[ClusterStatus], None],
    ) -> None:
        """`fill(status)` writes what isn't known here."""
        self._engine, self._meter, self._tenants, self._fill = engine, meter, tenants, fill
        self.newest = ClusterStatus()
        self._measured_at = 0.0

    @property
    def due_in_s(self) -> float:
        return max(0.0, self._measured_at + PERIOD_S - time.monotonic())

    def expire(self) -> None:
        """A new one is due at once."""
        self._measured_at = 0.0

    def measure(self, requests: Iterable[Request]) -> None:
        """Make a new one; `requests` are those that are in the engine."""
        status = ClusterStatus(load=self._load())
        self._meter.load(status.load)
        status.measured_at = time.time()
        status.tenants.extend(self._tenants.of(requests))
        self._meter.held(status.tenants)
        self._fill(status)
        self.newest = status
        self._measured_at = time.monotonic()

    def _load(self) -> EngineLoad:
        """The engine's numbers; the rate is kept from the last second in which there was one."""
        stats = self._engine.stats()
        self._meter.shares(stats.fair_share)
        load = to_load(stats)
        before = self.newest.load
        new_tokens = load.decode_tokens - before.decode_tokens
        if new_tokens > 0 and self._measured_at > 0:
            load.decode_tokens_per_s = new_tokens / (time.monotonic() - self._measured_at)
        else:
            load.decode_tokens_per_s = before.decode_tokens_per_s
        return load
