"""Check what texts name: files, links, modules to run, configuration keys, metrics, decisions.

Prints each name that does not exist, and fails. Of sources, only the files that they name are
checked. `mkdocs build --strict` checks the site's links.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from cluster.config import settings
from cluster.metrics import METRICS

ROOT = Path(__file__).parent.parent
FOLDERS = "bench|cluster|demo|deployments|docs|engine|experts|helm|protos|scripts|tests"
SOURCES = {".py", ".cpp", ".h", ".lua", ".proto", ".yaml", ".yml", ".js"}
PATH = re.compile(rf"(?<![\w/.~:-])(?:{FOLDERS}|\.ci|\.github)/[\w./-]*\w")
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
MODULE = re.compile(r"python -m ((?:bench|scripts)[a-z0-9_.]*[a-z0-9_])(?![A-Z])")
KEY = re.compile(r"`((?:gateway|engine|experts|store|ray)\.(?!log)[a-z_]+)(?:`|:|=)")
METRIC = re.compile(r"`(briolette_[a-z_]+?)(?:_bucket|_sum|_count)?[`{]")
STATUS = re.compile(r"\*(?:Accepted|Superseded by \[.+\]), \d{1,2} [A-Z][a-z]+ 20\d\d\.\*")

KEYS = {setting.key for setting in settings()}
METRIC_NAMES = {spec.name for spec in METRICS}


def texts() -> list[Path]:
    """All pages and the texts beside them."""
    beside = [*ROOT.glob("*.md"), ROOT / "demo/gemma4-moe-demo/README.md"]
    return sorted([*beside, *(ROOT / "docs").rglob("*.md")])


def sources() -> list[Path]:
    """All files whose comments may name another file."""
    inside = [path for folder in FOLDERS.split("|") for path in (ROOT / folder).rglob("*.*")]
    return sorted(path for path in inside if path.suffix in SOURCES)


def missing_files(path: Path) -> Iterator[str]:
    """Files that a text or a source names and that do not exist."""
    return (name for name in PATH.findall(path.read_text()) if not (ROOT / name).exists())


def missing(path: Path) -> Iterator[str]:
    """What else a text names and does not exist."""
    text = path.read_text()
    for link in LINK.findall(text):
        if "://" not in link and not (path.parent / link).exists():
            yield link
    for module in MODULE.findall(text):
        file = ROOT / module.replace(".", "/")
        if not (file.with_suffix(".py").exists() or (file / "__main__.py").exists()):
            yield f"python -m {module}"
    if path.name != "CHANGELOG.md":  # which tells of renamed keys
        yield from (key for key in KEY.findall(text) if key not in KEYS)
    yield from (name for name in METRIC.findall(text) if name not in METRIC_NAMES)


def unlisted_decisions() -> Iterator[str]:
    """Decisions without a status and a date, or without their line in the index."""
    index = (ROOT / "docs/decisions/index.md").read_text()
    for path in sorted((ROOT / "docs/decisions").glob("0*.md")):
        title, _, status, *_ = path.read_text().splitlines()
        number, _, name = title.removeprefix("# ").partition(". ")
        if not STATUS.fullmatch(status):
            yield f"{path.name}: its third line must be like *Accepted, 24 November 2026.*"
        if f"| {number} | [{name}]({path.name}) |" not in index:
            yield f"{path.name}: docs/decisions/index.md has no line for it"


def main() -> int:
    """Print all that is missing; return the exit code."""
    found = [(path, name) for path in texts() for name in missing(path)]
    found += [(path, name) for path in texts() + sources() for name in missing_files(path)]
    lines = {f"{path.relative_to(ROOT)}: {name}" for path, name in found}
    lines.update(unlisted_decisions())
    for line in sorted(lines):
        print(line)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
