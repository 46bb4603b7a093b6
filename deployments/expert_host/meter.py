"""An expert host's metrics: its tokens, by layer and by group."""

from __future__ import annotations

from typing import Any

from prometheus_client.core import CounterMetricFamily

from cluster.metric_families import MetricSpec
from cluster.metrics import Metrics, part_registry
from cluster.placement import ExpertGroups
from experts.host import ExpertHost


class HostMeter:
    """A Prometheus collector that reads a host's load for every scrape; scrapes may overlap."""

    def __init__(self, host: ExpertHost, groups: ExpertGroups, model: str) -> None:
        """Register with a registry of its own.

        Args:
            host: Its load is read.
            groups: The cut of the experts.
            model: A label.
        """
        self.registry = part_registry()
        self._host = host
        self._groups = groups
        self._model = model
        self.registry.register(self)

    def collect(self) -> list[CounterMetricFamily]:
        """Return the counters; Prometheus's client calls it for every scrape."""
        by_layer, by_group = map(
            _family, (Metrics.expert_tokens_total, Metrics.expert_group_tokens_total)
        )
        labels, stats = (self._model, self._host.host_id), self._host.stats()
        for layer_idx, row in enumerate(stats.expert_load):
            by_layer.add_metric((*labels, str(layer_idx)), sum(row))
        for group_id in stats.group_ids:
            experts = self._groups.experts_of(group_id)
            num_tokens = sum(row[expert] for row in stats.expert_load for expert in experts)
            by_group.add_metric((*labels, str(group_id)), num_tokens)
        return [by_layer, by_group]


def _family(spec: MetricSpec[Any]) -> CounterMetricFamily:
    return CounterMetricFamily(spec.name, spec.help, labels=spec.labels)
