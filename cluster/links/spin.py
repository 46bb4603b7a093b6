"""Spinning: a wait for a message starts with a short spin if that paid lately and a core idles."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

SPIN_S = 100e-6  # longest spin; to sleep and be woken takes an idle core 30 to 50 µs
MIN_SHARE_SHORT = 0.5  # of the last waits, for a spin
NUM_WAITS = 8  # about so many of the last waits count
LOOK_S = 0.01  # between two looks at what the cores have to do

_LOAD = Path("/proc/loadavg")


def count_runnable() -> int:
    """Return the number of threads of this machine that run or wait for a core, ours included."""
    return int(_LOAD.read_text().split()[3].partition("/")[0])


class Spinner:
    """Decides how long one link's receiver spins before it sleeps.

    A wait may spin when most of the last ones, slept through or not, ended within SPIN_S, and when
    no thread waits for a core, so that a spin takes only what would idle. So it starts by itself,
    and ends by itself where messages come late.
    """

    def __init__(
        self,
        num_cores: int | None = None,
        count_runnable: Callable[[], int] = count_runnable,
    ) -> None:
        """Start without spinning.

        Args:
            num_cores: Cores that this process may use; None asks the kernel.
            count_runnable: Returns how many threads run or wait for a core.
        """
        self._num_cores = num_cores or len(os.sched_getaffinity(0))
        self._count_runnable = count_runnable
        self._share_short = 0.0  # of the last waits, the older the less they count
        self._next_look_at = 0.0
        self._has_spare_core = False

    def limit_s(self, now: float) -> float:
        """Return the seconds that a wait may spin which begins now, on time.monotonic's clock."""
        if self._share_short < MIN_SHARE_SHORT:
            return 0.0
        if now >= self._next_look_at:
            self._next_look_at = now + LOOK_S
            self._has_spare_core = self._count_runnable() <= self._num_cores
        return SPIN_S if self._has_spare_core else 0.0

    def learn(self, waited_s: float) -> None:
        """Record how long a wait was, from its start to the first bytes."""
        self._share_short += ((waited_s <= SPIN_S) - self._share_short) / NUM_WAITS
