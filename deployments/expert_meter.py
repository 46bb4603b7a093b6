"""What the decoder tells Prometheus about expert calls."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.metrics import Metrics
from cluster.placement import ExpertPlacement
from experts.stats import CallStats


class ExpertMeter:
    """Is told of every call by the router, and of the rest once a second."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._waited_s = 0.0

    def answered(self, host_id: str, latency_s: float) -> None:
        self._metrics.expert_call_duration_seconds(self._model, host_id).observe(latency_s)

    def failed(self, host_id: str) -> None:
        self._metrics.expert_retries_total(self._model, host_id).inc()

    def update(
        self, placement: ExpertPlacement, stats: CallStats, problems: Mapping[str, str]
    ) -> None:
        """The links, the placement, and the time that nothing hid."""
        for host_id in placement.host_ids:
            is_up = host_id not in problems
            self._metrics.expert_link_up(self._model, host_id).set(is_up)
        self._metrics.placement_epoch(self._model).set(placement.epoch)
        waited_s = stats.waited_s
        self._metrics.expert_wait_seconds_total(self._model).inc(waited_s - self._waited_s)
        self._waited_s = waited_s
