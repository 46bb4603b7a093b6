"""ByArrival: fair share switched off that still counts, for comparisons in benches and tests."""

from __future__ import annotations

from collections.abc import Collection

from engine.request import Request, RequestState
from engine.scheduling.fair_share import FairShare


class ByArrival(FairShare):
    """Orders requests by arrival, and counts service as fair share does."""

    def order(self, requests: Collection[Request]) -> list[Request]:
        super().order(requests)
        return sorted(requests, key=lambda r: (r.state is not RequestState.RUNNING, r.arrived_at))

    def select_victim(self, *_: object) -> None:
        return None

    def may_backfill(self, *_: object) -> bool:
        return False
