"""The progress of each part's start, or the reason of its failure, in files that `up` watches.

Ray starts each part in a process of its own, so that an exception would reach the user late and as
a stack trace; the file carries one sentence.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.errors import BrioletteError
from cluster.files import write_atomic

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StartReport:
    """The state of one part's start."""

    part: str  # "gateway", "decoder" or a host id
    progress: float = 0.0  # 0 to 1
    error: str | None = None
    address: str | None = None  # host:port of the gateway, once it listens
    base_url: str | None = None  # of its HTTP, for OpenAI's clients


class Reporter:
    """Writes the reports of one part."""

    def __init__(self, state_dir: Path, part: str) -> None:
        self._path = _folder(state_dir) / f"{part}.json"
        self._part = part

    def progress(self, num_done: int, num_total: int) -> None:
        """Report that `num_done` of `num_total` tensors are loaded."""
        self._write(StartReport(self._part, num_done / max(1, num_total)))

    def listening(self, address: str, base_url: str | None) -> None:
        """Report where the gateway listens."""
        self._write(StartReport(self._part, 1.0, address=address, base_url=base_url))

    def failed(self, sentence: str) -> None:
        """Report why the part can't start."""
        self._write(StartReport(self._part, error=sentence))

    def _write(self, report: StartReport) -> None:
        write_atomic(self._path, json.dumps(asdict(report)))


@contextmanager
def reporting(state_dir: Path, part: str) -> Iterator[Reporter]:
    """Log to the part's file, and report the error if the `with` block, its start, fails."""
    log_to(state_dir, part)
    reporter = Reporter(state_dir, part)
    reporter.progress(0, 1)
    try:
        yield reporter
    except BrioletteError as error:
        reporter.failed(str(error))
        raise
    except Exception as error:  # border: the start of a part
        log.exception("%s could not start.", part)
        reporter.failed(f"{part}: {type(error).__name__}: {error} (see logs/{part}.log)")
        raise


def read_reports(state_dir: Path) -> list[StartReport]:
    """Return the newest report of every part."""
    return [
        StartReport(**json.loads(path.read_text()))
        for path in sorted(_folder(state_dir).glob("*.json"))
    ]


def clear_reports(state_dir: Path) -> None:
    """Delete the reports of an earlier start."""
    for path in _folder(state_dir).iterdir():
        path.unlink()


def log_to(state_dir: Path, part: str) -> None:
    """Write this process's log to logs/PART.log in the state directory."""
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
