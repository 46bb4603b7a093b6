"""Write docs/metrics.md from cluster/metrics.py; with --check, fail where it differs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.metrics import LABELS, METRICS

PAGE = Path(__file__).parent.parent / "docs/metrics.md"
INTRODUCTION = """# Metrics

Each part serves `/metrics`; `prometheus_targets.json` in the state directory lists them for \
Prometheus' file discovery. This page is written by `python scripts/metrics_page.py` from \
`cluster/metrics.py`, which declares them all. Durations are in seconds, sizes in bytes.
"""


def make_page() -> str:
    rows = [
        (f"`{spec.name}`", spec.kind.__name__.lower(), ", ".join(spec.labels), spec.help)
        for spec in METRICS
    ]
    labels = sorted(LABELS.items())
    return "\n".join(
        [
            INTRODUCTION,
            *table(("metric", "type", "labels", "meaning"), rows),
            "",
            *table(("label", "meaning"), labels),
            "",
        ]
    )


def table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [columns, ("---",) * len(columns), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def main() -> int:
    page = make_page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page)
    elif PAGE.read_text() != page:
        print("docs/metrics.md is not what scripts/metrics_page.py writes; run it.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
