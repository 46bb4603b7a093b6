"""What the decoder tells Prometheus about expert calls."""

from __future__ import annotations

from typing import Protocol

from cluster.metrics import Metrics
from cluster.placement import ExpertPlacement
from experts.router import ExpertRouter


class Remote(Protocol):
    """What is read of the decoder's remote experts."""

    placement: ExpertPlacement
    router: ExpertRouter


class ExpertMeter:
    """Brings the router's counters into the metrics, once a second."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._waited_s = 0.0
        self._num_retries = 0

    def update(self, experts: Remote) -> None:
        metrics, stats = self._metrics, experts.router.stats()
        problems = experts.router.problems()
        for host_id in experts.placement.host_ids:
            metrics.expert_link_up(self._model, host_id).set(host_id not in problems)
        metrics.placement_epoch(self._model).set(experts.placement.epoch)
        waited_s = stats.waited_s
        metrics.expert_wait_seconds_total(self._model).inc(waited_s - self._waited_s)
        self._waited_s = waited_s
