"""What a run has served to whom: times to the first token, the gap between two, Jain's index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

WINDOW_S = 10.0


@dataclass
class Record:
    """What happened in a run, step by step."""

    ttft_s: dict[str, list[float]] = field(default_factory=dict)  # by tenant, from its due time
    ttft_steps: dict[str, list[int]] = field(default_factory=dict)  # 1 is the least
    times: list[float] = field(default_factory=list)  # at the end of each step
    step_s: list[float] = field(default_factory=list)
    service: list[dict[str, float]] = field(default_factory=list)
    waiting: list[set[str]] = field(default_factory=list)  # tenants that the step left waiting
    num_refused: Counter[str] = field(default_factory=Counter)
    num_preemptions: int = 0

    def first_token(self, tenant: str, seconds: float, num_steps: int) -> None:
        self.ttft_s.setdefault(tenant, []).append(seconds)
        self.ttft_steps.setdefault(tenant, []).append(num_steps)

    def p99_ttft_ms(self, tenant: str) -> float:
        return float(np.percentile(self.ttft_s[tenant], 99)) * 1e3

    def p99_ttft_steps(self, tenant: str) -> float:
        return float(np.percentile(self.ttft_steps[tenant], 99))

    @property
    def p99_step_ms(self) -> float:
        return float(np.percentile(self.step_s, 99)) * 1e3

    @property
    def service_per_s(self) -> float:
        return sum(self.service[-1].values()) / self.times[-1]

    def gap(self, a: str, b: str) -> float:
        """The largest difference in service over any time in which both waited."""
        largest, ahead = 0.0, list[float]()
        for service, waiting in zip(self.service, self.waiting, strict=True):
            if {a, b} <= waiting:
                ahead.append(service[a] - service[b])
                largest = max(largest, max(ahead) - min(ahead))
            else:
                ahead.clear()
        return largest

    def jain(self, weights: dict[str, float]) -> float:
        """The lowest of Jain's indexes of weighted service in the windows that end at a step."""
        return min(self._jain_from(start, weights) for start in self._window_starts())

    def _window_starts(self) -> Iterator[tuple[int, int]]:
        for stop, now in enumerate(self.times):
            start = int(np.searchsorted(self.times, now - WINDOW_S))
            if start > 0:
                yield start - 1, stop

    def _jain_from(self, window: tuple[int, int], weights: dict[str, float]) -> float:
        before, after = (self.service[index] for index in window)
        rates = [(after[t] - before.get(t, 0.0)) / weight for t, weight in weights.items()]
        return sum(rates) ** 2 / (len(rates) * sum(rate**2 for rate in rates))
