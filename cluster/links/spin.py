"""Whether a wait for a message starts with a short spin: where it lately paid and costs nobody."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

SPIN_S = 100e-6  # longest spin; to sleep and be woken takes an idle core 30 to 50 µs
ENOUGH = 0.5  # of the last waits must have been short
MEMORY = 8  # so many waits, or about
LOOK_S = 0.01  # between two looks at what the cores have to do

_LOAD = Path("/proc/loadavg")


def count_runnable() -> int:
    """Threads of this machine that run or wait for a core, this one included."""
    return int(_LOAD.read_text().split()[3].partition("/")[0])


class Spinner:
    """The spins of one link's receiver.

    A wait may spin when most of the last ones, slept through or not, ended within SPIN_S, and when
    no thread waits for a core, so that a spin takes only what would idle. So it starts by itself,
    and ends by itself where messages come late.
    """

    def __init__(
        self,
        num_cores: int | None = None,
        count_runnable: Callable[[], int] = count_runnable,
    ) -> None:
        """`num_cores`: that this process may use; None asks the kernel."""
        self._num_cores = num_cores or len(os.sched_getaffinity(0))
        self._count_runnable = count_runnable
        self._share_short = 0.0  # of the last waits, the older the less they count
        self._look_at_s = 0.0
        self._has_spare_core = False

    def limit_s(self, now_s: float) -> float:
        """How long a wait that begins now may spin."""
        if self._share_short < ENOUGH:
            return 0.0
        if now_s >= self._look_at_s:
            self._look_at_s = now_s + LOOK_S
            self._has_spare_core = self._count_runnable() <= self._num_cores
        return SPIN_S if self._has_spare_core else 0.0

    def learn(self, waited_s: float) -> None:
        """Take note of how long a wait was, from its begin to the first bytes."""
        self._share_short += ((waited_s <= SPIN_S) - self._share_short) / MEMORY
