"""CPU scheduling policies, in a process of its own: a policy holds for all of its threads."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import os, threading
from deployments.process.priority import give_way, go_first

ended = threading.Event()
thread = threading.Thread(target=ended.wait)
thread.start()

def policies():
    return {os.sched_getscheduler(int(thread_id)) for thread_id in os.listdir("/proc/self/task")}

give_way()
assert policies() == {os.SCHED_BATCH}
pid = os.fork()
if pid == 0:
    os._exit(0 if policies() == {os.SCHED_BATCH} else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
go_first()
assert policies() == {os.SCHED_OTHER}
ended.set()
"""


def test_every_thread_and_child_of_a_process_gives_way_until_it_goes_first() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=30)
