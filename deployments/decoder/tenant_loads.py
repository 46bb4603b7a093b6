"""What each tenant asks of the decoder, for the status."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from engine.request import Request, RequestState
from protos.briolette.v1.admin_pb2 import TenantLoad


class TenantLoads:
    """Counts tokens and looks at requests; called by the step loop only."""

    def __init__(self, held_bytes: Callable[[Request], int]) -> None:
        """`held_bytes` says how much of the KV cache a request holds."""
        self._held_bytes = held_bytes
        self._totals: defaultdict[str, TenantLoad] = defaultdict(TenantLoad)

    def accepted(self, request: Request) -> None:
        """A request entered the queue."""
        self._totals[request.tenant].prompt_tokens += len(request.prompt_ids)

    def generated(self, request: Request, num_tokens: int) -> None:
        """A step brought new tokens."""
        self._totals[request.tenant].output_tokens += num_tokens

    def of(self, requests: Iterable[Request]) -> list[TenantLoad]:
        """By tenant, with those of its requests that are not finished."""
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
