"""Benches in turn, a process for each, so that none inherits the threads and memory of another."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.lib.card import Check, pin, report

STOP_S = 60.0  # to stop what it started, once interrupted


@dataclass(frozen=True, slots=True)
class Part:
    """A bench, the time that it may take, and options for a run that only shows that it works."""

    limit_s: float
    quick: tuple[str, ...] = ()


def gather(
    bench: str, parts: Mapping[str, Part], about: str | None, argv: Sequence[str] | None
) -> dict[str, Any]:
    """Run the parts, print their cards and all checks, return the JSON object."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--quick", action="store_true", help="small sizes: numbers mean nothing")
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    args = parser.parse_args(argv)
    pin(2)
    results: dict[str, Any] = {}
    checks: list[Check] = []
    for name in args.parts:
        part = parts[name]
        summary = run(
            f"{bench}.{name}", part.limit_s, ["--no-keep", *(part.quick if args.quick else ())]
        )
        if summary is None:
            checks.append(Check(f"bench.{name} ended without a result", None, "", 1))
            continue
        results[name] = summary["results"]
        checks += map(Check.from_json, summary["checks"])
    return report(bench, results, checks, [], keep=args.keep)


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
