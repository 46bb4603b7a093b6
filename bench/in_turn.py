"""Benches in turn, a process for each, so that none inherits the threads and memory of another."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

STOP_S = 60.0  # to stop what it started, once interrupted


def run(name: str, limit_s: float, options: Sequence[str] = ()) -> dict[str, Any] | None:
    """Run `python -m bench.{name}`, passing on what it prints; its JSON object, or None if it gave
    none. After `limit_s` it is interrupted.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", f"bench.{name}", *options], stdout=subprocess.PIPE, text=True
    )
    alarm = threading.Timer(limit_s, process.send_signal, (signal.SIGINT,))
    last_resort = threading.Timer(limit_s + STOP_S, process.kill)
    alarm.start()
    last_resort.start()
    last: str | None = None
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if last is not None:
                print(last, flush=True)
            last = line.rstrip("\n")
        process.wait()
    except KeyboardInterrupt:
        process.wait(STOP_S)  # it got the signal too
        raise
    finally:
        alarm.cancel()
        last_resort.cancel()
    try:
        summary: dict[str, Any] = json.loads(last or "")
        return summary
    except json.JSONDecodeError:
        print(last or "", flush=True)
        return None
