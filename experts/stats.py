"""What a router has measured: calls, their latency, retries, and the time that overlap hid."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Protocol

from cluster.metrics import CALL_BUCKETS


class CallObserver(Protocol):
    """Is told of every call, in the thread that combines: it must be quick."""

    def answered(self, host_id: str, latency_s: float) -> None: ...
    def failed(self, host_id: str) -> None: ...


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
        """Of the time that the hosts took, the part that passed while this process did other work:
        the dense MLP, the other micro-batch.
        """
        total_s = self.hidden_s + self.waited_s
        return self.hidden_s / total_s if total_s else 0.0

    def latency_quantile_s(self, quantile: float) -> float:
        """The quantile, linear inside the bucket that holds it; 0 before the first call."""
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

    def count_combine(self, between_s: float, compute_s: float, waited_s: float) -> None:
        """Add one dispatch/combine pair: the time between the two, the slowest host's own, and the
        time inside combine.
        """
        self.hidden_s += min(between_s, compute_s)
        self.waited_s += waited_s
