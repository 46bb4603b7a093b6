"""The decoder's status, which is sent to its gateways about once a second."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable

from cluster.placement import ExpertGroups
from deployments.decoder.kv.block_store import KVBlockStore
from deployments.decoder.meters import EngineMeter
from deployments.decoder.remote_experts import RemoteExperts
from deployments.messages import to_group_load, to_kv_store, to_load
from engine.core import EngineCore
from engine.request import Request, RequestState
from experts.stats import ExpertLoad
from protos.briolette.v1.admin_pb2 import ClusterStatus, EngineLoad, TenantLoad

PERIOD_S = 1.0


class TenantLoads:
    """Each tenant's tokens since the start, and its unfinished requests. Not thread-safe."""

    def __init__(self, held_bytes: Callable[[Request], int]) -> None:
        """Start at zero; `held_bytes` returns the bytes of KV cache that a request references."""
        self._held_bytes = held_bytes
        self._totals: defaultdict[str, TenantLoad] = defaultdict(TenantLoad)

    def accepted(self, request: Request) -> None:
        """Count the prompt of a request that entered the queue."""
        self._totals[request.tenant].prompt_tokens += len(request.prompt_ids)

    def generated(self, request: Request, num_tokens: int) -> None:
        """Count new tokens of a request."""
        self._totals[request.tenant].output_tokens += num_tokens

    def measure(self, requests: Iterable[Request]) -> list[TenantLoad]:
        """Return the load of every tenant by name; `requests` are all unfinished ones."""
        loads = {}
        for tenant, total in sorted(self._totals.items()):
            loads[tenant] = TenantLoad(tenant=tenant)
            loads[tenant].MergeFrom(total)
        for request in requests:
            load = loads[request.tenant]
            load.num_running += request.state is RequestState.RUNNING
            load.num_waiting += request.state is not RequestState.RUNNING
            load.kv_bytes += self._held_bytes(request)
        return list(loads.values())


class LoopStatus:
    """The status as the step loop measured it last, and when it is due again."""

    def __init__(
        self,
        engine: EngineCore,
        meter: EngineMeter,
        tenants: TenantLoads,
        fill: Callable[[ClusterStatus], None],
    ) -> None:
        """Start with an empty status; `fill(status)` adds what the step loop doesn't know."""
        self._engine, self._meter, self._tenants, self._fill = engine, meter, tenants, fill
        self.newest = ClusterStatus()
        self._measured_at = 0.0

    @property
    def due_in_s(self) -> float:
        """Seconds until the status should be measured again; 0 if it is due."""
        return max(0.0, self._measured_at + PERIOD_S - time.monotonic())

    def expire(self) -> None:
        """Make the status due at once."""
        self._measured_at = 0.0

    def measure(self, requests: Iterable[Request]) -> None:
        """Replace `newest`; `requests` are all unfinished ones."""
        status = ClusterStatus(load=self._load())
        self._meter.load(status.load)
        status.measured_at = time.time()
        status.tenants.extend(self._tenants.measure(requests))
        self._meter.held(status.tenants)
        self._fill(status)
        self.newest = status
        self._measured_at = time.monotonic()

    def _load(self) -> EngineLoad:
        """Return the engine's numbers; a period without new tokens keeps the last decode rate."""
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


class DecoderStatus:
    """The part of the status that the step loop doesn't know: model, experts, KV store."""

    def __init__(
        self,
        *,
        constant: ClusterStatus,
        groups: ExpertGroups,
        expert_load: ExpertLoad | None,
        remote_experts: RemoteExperts | None,
        store: KVBlockStore | None,
    ) -> None:
        """Take what never changes, and the parts to ask for the rest.

        Args:
            constant: copied into every status.
            groups: the cut of the experts for which `expert_load` is reported.
            expert_load: counts the tokens of each expert; None if nothing counts them.
            remote_experts: the expert hosts; None if there are none.
            store: the KV store; None if there is none.
        """
        self._constant, self._groups = constant, groups
        self._expert_load, self._remote_experts = expert_load, remote_experts
        self._store = store

    def fill(self, status: ClusterStatus) -> None:
        """Write into a status. Never waits; runs in the step thread."""
        status.MergeFrom(self._constant)
        if self._expert_load is not None:
            status.group_load.extend(to_group_load(self._expert_load, self._groups))
        if self._remote_experts is not None:
            self._remote_experts.fill_status(status)
        if self._store is not None:
            status.kv_store.CopyFrom(to_kv_store(self._store.status))
