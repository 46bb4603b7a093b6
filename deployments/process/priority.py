"""CPU scheduling: the decoder and the expert hosts preempt every other process of the cluster.

The decoder waits for the answer of each layer, so a decoder or an expert host that wakes up should
get a core at once. Linux gives a process with the policy SCHED_BATCH its share of a core, but never
lets it preempt another when it wakes up (`man 7 sched`). The supervisor sets this policy for itself
and all that it starts, Ray and the gateway included; the engine's processes leave it.
"""

from __future__ import annotations

import os
from contextlib import suppress


def give_way() -> None:
    """Keep this process, and those that it starts from now on, from preempting others."""
    _schedule(os.SCHED_BATCH)


def go_first() -> None:
    """Let this process preempt those that give way."""
    _schedule(os.SCHED_OTHER)


def _schedule(policy: int) -> None:
    for thread_id in map(int, os.listdir("/proc/self/task")):
        with suppress(ProcessLookupError, PermissionError):  # it has ended; a container forbids it
            os.sched_setscheduler(thread_id, policy, os.sched_param(0))
