"""Fetch or recompute: the decision, and the measured rates that it rests on."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median_low

WEIGHT = 0.2  # of a new measurement in the moving average
LIFE_S = 600.0  # of a measurement: a rate so low that nothing is read would last for ever
NUM_LOOKUPS = 9  # in the median; of two, the quicker one counts
MIN_READ_BYTES = 256 << 10  # a shorter read measures the latency, not the rate


def worth_fetching(
    num_bytes: int, compute_s: float | None, read_bytes_per_s: float | None, latency_s: float
) -> bool:
    """Return whether fetching KV values is expected to take less time than recomputing them.

    Args:
        num_bytes: Bytes to fetch.
        compute_s: Seconds to recompute them; None if unknown.
        read_bytes_per_s: Measured rate of reads; None if unknown.
        latency_s: Measured latency of a look-up.

    Returns:
        True also if either is unknown: fetching then measures it.
    """
    if read_bytes_per_s is None or compute_s is None:
        return True
    return latency_s + num_bytes / read_bytes_per_s < compute_s


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured bandwidth and latency of reads."""

    read_bytes_per_s: float | None  # None before the first long read
    latency_s: float  # 0 before the first look-up


class RateMeter:
    """Measures the moving average of the rate of reads, and the median latency. Any thread may
    call.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._read_bytes_per_s: float | None = None
        self._last_read_at = 0.0
        self._lookups: deque[tuple[float, float]] = deque(maxlen=NUM_LOOKUPS)  # (moment, seconds)

    @property
    def rates(self) -> Rates:
        """The rates measured within the last LIFE_S seconds."""
        oldest = self._clock() - LIFE_S
        with self._lock:
            rate = self._read_bytes_per_s if self._last_read_at >= oldest else None
            recent = [seconds for when, seconds in self._lookups if when >= oldest]
        return Rates(rate, median_low(recent) if recent else 0.0)

    def saw_lookup(self, seconds: float) -> None:
        """Record the seconds that a look-up took: about one round trip."""
        with self._lock:
            self._lookups.append((self._clock(), seconds))

    def saw_read(self, num_bytes: int, seconds: float) -> None:
        """Record a read: its bytes, and the seconds from the request to the last of them."""
        if num_bytes < MIN_READ_BYTES:
            return
        with self._lock:
            # Averaged as time per byte: of two unlike reads the slow one takes the time.
            now, old = seconds / num_bytes, self._read_bytes_per_s
            mean = now if old is None else 1 / old + WEIGHT * (now - 1 / old)
            self._last_read_at, self._read_bytes_per_s = self._clock(), 1 / mean
