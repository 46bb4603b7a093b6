"""A metric with its children by label values; of tenants only so many are shown by name."""

from __future__ import annotations

from typing import Any, Generic, TypeVar, overload

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

PREFIX = "briolette_"
MAX_NAMED_TENANTS = 200  # in one process: a tenant may cost some 70 time series
OTHERS = "(others)"  # all that came later, together; no tenant is called so

M = TypeVar("M", Counter, Gauge, Histogram)


class TenantNames:
    """The tenants that a process shows by name: those that it met first."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def shown(self, tenant: str) -> str:
        """The label's value for a tenant: its name, or OTHERS."""
        if tenant not in self._names and len(self._names) < MAX_NAMED_TENANTS:
            self._names.add(tenant)
        return tenant if tenant in self._names else OTHERS


class Family(Generic[M]):
    """One metric with its children by label values; `metrics.preemptions_total("m").inc()`.

    A child that was met before costs one dict lookup. Code that runs for every token or expert
    call keeps the child itself.
    """

    def __init__(self, metric: M, labels: tuple[str, ...], tenants: TenantNames) -> None:
        self._metric: M = metric
        self._tenant_at = labels.index("tenant") if "tenant" in labels else None
        self._tenants = tenants
        self._children: dict[tuple[str, ...], M] = {}

    def __call__(self, *label_values: str) -> M:
        """The child with these label values, in the order in which the labels are declared."""
        child = self._children.get(label_values)
        return self._child(self._bounded(label_values)) if child is None else child

    def shows(self, tenant: str) -> bool:
        """Whether this tenant has a child of its own."""
        return self._tenants.shown(tenant) == tenant

    def remove(self, *label_values: str) -> None:
        """Stop showing a child, as when its expert host is gone for good."""
        if self._children.pop(label_values, None) is not None:
            self._metric.remove(*label_values)

    def _child(self, label_values: tuple[str, ...]) -> M:
        child = self._children.get(label_values)
        if child is None:
            child = self._children[label_values] = self._metric.labels(*label_values)
        return child

    def _bounded(self, label_values: tuple[str, ...]) -> tuple[str, ...]:
        values = list(label_values)
        if self._tenant_at is not None:
            values[self._tenant_at] = self._tenants.shown(values[self._tenant_at])
        return tuple(values)


class TenantGauge:
    """A gauge with the labels model and tenant that shows the sum of those without a name."""

    def __init__(self, gauge: Family[Gauge], model: str) -> None:
        self._gauge = gauge
        self._model = model
        self._others: dict[str, float] = {}
        self._sum = 0.0

    def set(self, tenant: str, value: float) -> None:
        """A tenant's own value."""
        if self._gauge.shows(tenant):
            self._gauge(self._model, tenant).set(value)
        else:
            self._sum += value - self._others.get(tenant, 0.0)
            self._others[tenant] = value
            self._gauge(self._model, OTHERS).set(self._sum)


class MetricSpec(Generic[M]):
    """The declaration of a metric; named by the attribute of `Metrics` that holds it."""

    def __init__(
        self, kind: type[M], help_text: str, labels: tuple[str, ...], buckets: tuple[float, ...]
    ) -> None:
        self.kind: type[M] = kind
        self.help = help_text
        self.labels = labels
        self.buckets = buckets  # of a histogram
        self.attribute = ""

    @property
    def name(self) -> str:
        """Name of the metric in Prometheus."""
        return PREFIX + self.attribute

    def create(self, registry: CollectorRegistry, tenants: TenantNames) -> Family[M]:
        """The metric itself, shown by a registry."""
        options: dict[str, Any] = {"buckets": self.buckets} if self.buckets else {}
        metric = self.kind(self.name, self.help, self.labels, registry=registry, **options)
        return Family(metric, self.labels, tenants)

    def __set_name__(self, owner: type, name: str) -> None:
        self.attribute = name

    @overload
    def __get__(self, instance: None, owner: type) -> MetricSpec[M]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Family[M]: ...
    def __get__(self, instance: object | None, owner: type) -> MetricSpec[M] | Family[M]:
        return self  # only on the class: an instance holds its Family under the same name
