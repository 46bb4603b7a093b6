"""Fetch or recompute: the choice, and the measured rates that it rests on."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median_low

WEIGHT = 0.2  # of a new measurement in the moving average
LIFE_S = 600.0  # of a measurement: a rate that forbids reads would last
NUM_LOOKUPS = 9  # remembered; of two unlike ones the quick one counts
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
    latency_s: float  # 0 until a look-up has told


class RateMeter:
    """A moving average of the rate of reads, and the median latency. Any thread may call."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._read_bytes_per_s: float | None = None
        self._last_read_at = 0.0
        self._lookups: deque[tuple[float, float]] = deque(maxlen=NUM_LOOKUPS)  # when, seconds

    @property
    def rates(self) -> Rates:
        oldest = self._clock() - LIFE_S
        with self._lock:
            rate = self._read_bytes_per_s if self._last_read_at >= oldest else None
            recent = [seconds for when, seconds in self._lookups if when >= oldest]
        return Rates(rate, median_low(recent) if recent else 0.0)

    def saw_lookup(self, seconds: float) -> None:
        """A look-up of keys took this long: about one round trip."""
        with self._lock:
            self._lookups.append((self._clock(), seconds))

    def saw_read(self, num_bytes: int, seconds: float) -> None:
        """A read brought so many bytes, from being asked for to the last one."""
        if num_bytes < LEAST_BYTES:
            return
        with self._lock:
            # Averaged as time per byte: of two unlike reads the slow one takes the time.
            now, old = seconds / num_bytes, self._read_bytes_per_s
            mean = now if old is None else 1 / old + WEIGHT * (now - 1 / old)
            self._last_read_at, self._read_bytes_per_s = self._clock(), 1 / mean
