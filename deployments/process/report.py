"""How far each part is with its start, or why it can't: small files that `up` watches.

A part runs in a process of its own that Ray starts, so its exception would reach the user late, as
a stack trace; the file carries the sentence.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.errors import BrioletteError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StartReport:
    """One part's state; `part` is "gateway", "decoder" or a host id."""

    part: str
    progress: float = 0.0  # 0 to 1
    error: str | None = None
    address: str | None = None  # where the gateway listens, once it does
    base_url: str | None = None  # of its HTTP, as OpenAI's clients want it


class Reporter:
    """Writes the report of one part."""

    def __init__(self, state_dir: Path, part: str) -> None:
        self._path = _folder(state_dir) / f"{part}.json"
        self._part = part

    def progress(self, num_done: int, num_total: int) -> None:
        """So many of so many tensors are loaded."""
        self._write(StartReport(self._part, num_done / max(1, num_total)))

    def listening(self, address: str, base_url: str | None) -> None:
        self._write(StartReport(self._part, 1.0, address=address, base_url=base_url))

    def failed(self, sentence: str) -> None:
        self._write(StartReport(self._part, error=sentence))

    def _write(self, report: StartReport) -> None:
        draft = self._path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(asdict(report)))
        draft.replace(self._path)  # a reader never sees half a file


@contextmanager
def reporting(state_dir: Path, part: str) -> Iterator[Reporter]:
    """Around a part's start: reports the reason if it fails."""
    log_to(state_dir, part)
    reporter = Reporter(state_dir, part)
    reporter.progress(0, 1)
    try:
        yield reporter
    except BrioletteError as error:
        reporter.failed(str(error))
        raise
    except Exception as error:  # the border of a start
        log.exception("%s could not start.", part)
        reporter.failed(f"{part}: {type(error).__name__}: {error} (logs/{part}.log has more)")
        raise


def read_reports(state_dir: Path) -> list[StartReport]:
    """What every part has reported so far."""
    return [
        StartReport(**json.loads(path.read_text()))
        for path in sorted(_folder(state_dir).glob("*.json"))
    ]


def clear_reports(state_dir: Path) -> None:
    """Forget an earlier start."""
    for path in _folder(state_dir).iterdir():
        path.unlink()


def log_to(state_dir: Path, part: str) -> None:
    """Send this process's log to a file of its own."""
    folder = state_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"{part}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)


def _folder(state_dir: Path) -> Path:
    folder = state_dir / "start"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
