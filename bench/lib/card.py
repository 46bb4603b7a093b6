"""What every bench prints: a card for people and, as the last line, one JSON object."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS_DIR = Path(__file__).resolve().parents[1] / "results"
PACKAGES = ("torch", "transformers", "ray", "grpcio", "xllamacpp")


@dataclass(frozen=True, slots=True)
class Check:
    """A number that was promised. Benches measure it and never assert it.

    `value` is None where it could not be measured here; such a check is neither kept nor broken.
    """

    name: str
    value: float | None
    unit: str
    target: float
    at_least: bool = True  # else the value must be at most the target

    @property
    def ok(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Check:
        """What `to_json` wrote."""
        sign, target = fields["target"].split()
        return Check(fields["name"], fields["value"], fields["unit"], float(target), sign == ">=")

    def to_json(self) -> dict[str, Any]:
        value = None if self.value is None else round(self.value, 4)
        target = f"{'>=' if self.at_least else '<='} {self.target:g}"
        return {
            "name": self.name,
            "value": value,
            "unit": self.unit,
            "target": target,
            "ok": self.ok,
        }


def report(
    bench: str,
    results: dict[str, Any],
    checks: Sequence[Check],
    card: Sequence[str],
    *,
    num_threads: int = 2,
    keep: bool = True,
) -> dict[str, Any]:
    """Print the card, the checks and the JSON line; keep the object under bench/results/."""
    machine = describe_machine(num_threads)
    summary = {
        "bench": bench,
        "machine": machine,
        "results": results,
        "checks": [check.to_json() for check in checks],
    }
    for line in (*heading(bench, machine), *card, *check_lines(checks)):
        print(line)
    if keep:
        RESULTS_DIR.mkdir(exist_ok=True)
        path = RESULTS_DIR / f"{bench}-{machine['name']}.json"
        path.write_text(json.dumps(summary, indent=1) + "\n")
        print(f"Kept in bench/results/{path.name}.")
    print(json.dumps(summary), flush=True)
    return summary


def heading(bench: str, machine: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = f"{machine['cpu']}, {machine['num_cores']} cores, {machine['num_threads']} threads"
    return ["", f"== {bench} ==", where, versions, f"load before: {machine['load']:.1f}", ""]


def check_lines(checks: Sequence[Check]) -> list[str]:
    """One line for each promise, with its verdict in words."""
    verdicts = {True: "kept", False: "MISSED", None: "not measured"}
    rows = [
        [
            check.name,
            "-" if check.value is None else f"{check.value:.3g}",
            f"{'>=' if check.at_least else '<='} {check.target:g} {check.unit}",
            verdicts[check.ok],
        ]
        for check in checks
    ]
    return table(["check", "value", "promised", ""], rows) if rows else []


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Plain columns: the first to the left, the others to the right."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return [text[0], "-" * max(map(len, text)), *text[1:], ""]


def describe_machine(num_threads: int) -> dict[str, Any]:
    """What a number depends on: the CPU, the cores we may use, versions, and who else computes."""
    cpu, cores = _cpu_model(), len(os.sched_getaffinity(0))
    slug = re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")
    return {
        "name": f"{slug}-{cores}c",
        "cpu": cpu,
        "num_cores": cores,
        "num_threads": num_threads,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load": round(_load_at_start, 2),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def pin(num_cores: int = 2) -> None:
    """Keep this process, and all that it starts, on the first `num_cores` of its cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_cores])


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# Runnable tasks of the last minute when the bench began: far above 0, its numbers say little.
_load_at_start = os.getloadavg()[0]
