"""Who runs first when the cores are few: the engine, then everything around it.

A layer's answer is waited for on the spot, so an expert host or a decoder that wakes up should have
a core at once, and nothing that merely passes tokens on should take it away. Linux lets a batch
process have its share of a core without ever interrupting another for it. The supervisor makes
itself one, with all that it starts (Ray, the gateway), and the engine's processes leave it.
"""

from __future__ import annotations

import os
from contextlib import suppress


def give_way() -> None:
    """This process and those that it starts from now on never interrupt others."""
    _schedule(os.SCHED_BATCH)


def go_first() -> None:
    """This process may interrupt those that give way."""
    _schedule(os.SCHED_OTHER)


def _schedule(policy: int) -> None:
    for thread_id in map(int, os.listdir("/proc/self/task")):
        with suppress(ProcessLookupError, PermissionError):  # one that ended; a container's rule
            os.sched_setscheduler(thread_id, policy, os.sched_param(0))
