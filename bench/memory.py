"""What remembering contexts costs and brings, in one run: `python -m bench.memory`, which is
`make bench-memory`. Each part is a bench of its own (`python -m bench.PART`); this one runs them in
turn and gathers their results and checks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.card import Check, pin, report
from bench.in_turn import run


@dataclass(frozen=True, slots=True)
class Part:
    """A bench, the time that it may take, and options for a run that only shows that it works."""

    limit_s: float
    quick: tuple[str, ...] = ()


# The limits are for a part that hangs: on a quiet machine all together take some 12 minutes.
PARTS = {
    "kv_rows": Part(60),
    "kv_store": Part(90, ("--values", "4", "--rounds", "1")),
    "write_behind": Part(150, ("--rounds", "1", "--tokens", "32")),
    "restore": Part(300, ("--lengths", "2048", "--prompts", "1")),
    "fetch_choice": Part(180, ("--lengths", "128", "256", "--rounds", "1")),
    "conversation": Part(90, ("--turns", "3")),
    "redis_cases": Part(420, ("--cases", "5")),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the parts, print their cards and all checks, return the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="small sizes: numbers mean nothing")
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    args = parser.parse_args(argv)
    pin(2)
    results: dict[str, Any] = {}
    checks: list[Check] = []
    for name in args.parts:
        part = PARTS[name]
        summary = run(name, part.limit_s, ["--no-keep", *(part.quick if args.quick else ())])
        if summary is None:
            checks.append(Check(f"bench.{name} ended without a result", None, "", 1))
            continue
        results[name] = summary["results"]
        checks += map(Check.from_json, summary["checks"])
    return report("memory", results, checks, [], keep=args.keep)


if __name__ == "__main__":
    main()
