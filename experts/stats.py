"""What routers and hosts count: calls and their latency, retries, hidden time, expert load."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cluster.metrics import CALL_BUCKETS


class CallObserver(Protocol):
    """Is told of every call, in the thread that combines, so it must be quick."""

    def answered(self, host_id: str, latency_s: float) -> None:
        """Note a call that a host answered."""
        ...

    def failed(self, host_id: str) -> None:
        """Note a call that must be asked again elsewhere."""
        ...


class ExpertLoad:
    """Counts tokens per layer and expert; one call costs one bincount.

    Not locked: a lost count under a race changes a statistic, never an answer.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.total = np.zeros((num_layers, num_experts), dtype=np.int64)

    def count(self, layer_idx: int, expert_ids: npt.NDArray[np.integer]) -> None:
        """Add one call's slots: logical expert ids [num_slots]."""
        self.total[layer_idx] += np.bincount(expert_ids, minlength=self.total.shape[1])


@dataclass(slots=True)
class CallStats:
    """Counters of one router. A call is one frame to one host and its answer."""

    num_calls: int = 0
    num_failures: int = 0  # calls that had to be asked again elsewhere
    num_retries: int = 0
    num_fallbacks: int = 0  # dispatches of which this process computed a part, for want of a host
    # Summed over calls, from sending to the answer's arrival; for one that had come before combine
    # asked for it, the host's own time and the time to take it in.
    latency_s: float = 0.0
    compute_s: float = 0.0  # of it, the hosts' own time
    # Of each dispatch/combine pair: other work in between, at most the slowest host's own time
    # (when an early answer came isn't known, and work done after that hides nothing).
    hidden_s: float = 0.0
    waited_s: float = 0.0  # inside combine
    latency_counts: list[int] = field(default_factory=lambda: [0] * (len(CALL_BUCKETS) + 1))

    @property
    def hidden_share(self) -> float:
        """The share of the hosts' time that passed while this process did other work: the dense
        MLP, the other micro-batch.
        """
        total_s = self.hidden_s + self.waited_s
        return self.hidden_s / total_s if total_s else 0.0

    def latency_quantile_s(self, quantile: float) -> float:
        """Return a quantile, linear inside the bucket that holds it; 0 before the first call."""
        left, lower = quantile * self.num_calls, 0.0
        for upper, count in zip(CALL_BUCKETS, self.latency_counts, strict=False):
            if count and left <= count:
                return lower + (upper - lower) * left / count
            left, lower = left - count, upper
        return lower if self.num_calls else 0.0

    def count_call(self, latency_s: float, compute_s: float) -> None:
        """Add one answered call."""
        self.num_calls += 1
        self.latency_s += latency_s
        self.compute_s += compute_s
        self.latency_counts[bisect.bisect_left(CALL_BUCKETS, latency_s)] += 1

    def count_combine(self, *, between_s: float, compute_s: float, waited_s: float) -> None:
        """Add one dispatch/combine pair.

        Args:
            between_s: time from dispatch to combine.
            compute_s: the slowest host's own time.
            waited_s: time inside combine.
        """
        self.hidden_s += min(between_s, compute_s)
        self.waited_s += waited_s
