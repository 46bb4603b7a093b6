"""Every bench in turn: `python -m bench`, which is `make bench`. Its last line is JSON for all."""

from __future__ import annotations

import json

from bench.lib.in_turn import run

BENCHES = ("engine", "links", "overlap")
LIMIT_S = {"engine": 1200.0, "links": 120.0, "overlap": 120.0}


def main() -> None:
    """Run all and print what was promised and kept."""
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


if __name__ == "__main__":
    main()
