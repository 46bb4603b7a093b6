"""Fetch or recompute: the choice, and the measured rates that it rests on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

WEIGHT = 0.2  # of a new measurement in the moving average
RATE_LIFE_S = 600.0  # then the next read measures anew: a rate that forbids reads would last
LEAST_BYTES = 256 << 10  # a shorter read measures the latency, not the rate


def worth_fetching(
    num_bytes: int, compute_s: float | None, read_bytes_per_s: float | None, latency_s: float
) -> bool:
    """Whether reading so many bytes of KV is expected to end before computing them would.

    What nobody has measured yet (None) speaks for fetching, which then measures it.
    """
    if read_bytes_per_s is None or compute_s is None:
        return True
    return latency_s + num_bytes / read_bytes_per_s < compute_s


@dataclass(frozen=True, slots=True)
class Rates:
    """What reads reached lately."""

    read_bytes_per_s: float | None  # None until a read was long enough to tell
    latency_s: float


class RateMeter:
    """Moving averages of the rate and the latency of reads. Any thread may call."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._rates = Rates(None, 0.0)
        self._last_read_at = 0.0

    @property
    def rates(self) -> Rates:
        rates = self._rates
        is_old = self._clock() - self._last_read_at > RATE_LIFE_S
        return Rates(None, rates.latency_s) if is_old else rates

    def saw_lookup(self, seconds: float) -> None:
        """A look-up of keys took this long: about one round trip."""
        with self._lock:
            old = self._rates.latency_s
            latency_s = seconds if old == 0.0 else old + WEIGHT * (seconds - old)
            self._rates = Rates(self._rates.read_bytes_per_s, latency_s)

    def saw_read(self, num_bytes: int, seconds: float) -> None:
        """A read brought so many bytes, from being asked for to the last one."""
        if num_bytes < LEAST_BYTES:
            return
        with self._lock:
            # Averaged as time per byte: of two unlike reads the slow one takes the time.
            now, old = seconds / num_bytes, self._rates.read_bytes_per_s
            self._last_read_at = self._clock()
            mean = now if old is None else 1 / old + WEIGHT * (now - 1 / old)
            self._rates = Rates(1 / mean, self._rates.latency_s)
