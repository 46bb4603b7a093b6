"""Every bench in turn: `python -m bench`, which is `make bench`. Its last line is JSON for all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from typing import Any

BENCHES = ("engine", "links", "overlap")
LIMIT_S = {"engine": 1200.0, "links": 120.0, "overlap": 120.0}
STOP_S = 60.0  # to stop what it started, once interrupted


def main() -> None:
    """A process for each bench, so that none inherits the threads and the memory of another."""
    summaries, failed = [], []
    for name in BENCHES:
        summary = run(name, LIMIT_S[name])
        if summary is None:
            failed.append(name)
        else:
            summaries.append(summary)
    checks = [check for summary in summaries for check in summary["checks"]]
    num_kept = sum(check["ok"] is True for check in checks)
    missed = [check["name"] for check in checks if check["ok"] is False]
    print(f"\n{num_kept} of {len(checks)} promises kept. Missed: {', '.join(missed) or 'none'}.")
    for name in failed:
        print(f"bench.{name} ended without a result; see above.")
    print(json.dumps({"bench": "all", "benches": summaries, "failed": failed, "checks": checks}))


def run(name: str, limit_s: float) -> dict[str, Any] | None:
    """Run one bench, passing on what it prints; its JSON object, or None if it gave none."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"bench.{name}"], stdout=subprocess.PIPE, text=True
    )
    alarm = threading.Timer(limit_s, process.send_signal, (signal.SIGINT,))
    last_resort = threading.Timer(limit_s + STOP_S, process.kill)
    alarm.start()
    last_resort.start()
    last = ""
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if last:
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
        summary: dict[str, Any] = json.loads(last)
        return summary
    except json.JSONDecodeError:
        print(last, flush=True)
        return None


if __name__ == "__main__":
    main()
