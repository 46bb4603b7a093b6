"""Becomes a Redis server that ends with its owner: `python redis_launcher.py PID LOCK WAIT_S CMD…`.

A program of its own, since this can't be done between fork and exec in a process with threads. It
asks for SIGTERM when the thread that started it dies, takes the lock, which then lasts as long as
the server, and removes what a killed server left behind. It runs by its path without our packages:
it must import nothing but the standard library.
"""

import ctypes
import fcntl
import glob
import os
import signal
import sys
import time

PR_SET_PDEATHSIG = 1  # of prctl(2)
POLL_S = 0.02


def launch(owner_pid: int, lock: str, wait_s: float, command: list[str]) -> None:
    """Replace this process by the server. Exits with a sentence if it may not start."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != owner_pid:
        sys.exit("The owner is gone.")
    lock_fd = take_lock(lock, wait_s)
    for left_over in glob.glob("temp-*"):
        os.unlink(left_over)
    os.set_inheritable(lock_fd, True)
    os.execv(command[0], command)


def take_lock(path: str, wait_s: float) -> int:
    """Lock a file and return its descriptor. Exits with a sentence if that takes too long."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    give_up_at = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > give_up_at:
                sys.exit("Another Redis server uses this directory.")
            time.sleep(POLL_S)


if __name__ == "__main__":
    launch(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4:])
