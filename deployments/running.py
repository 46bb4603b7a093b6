"""The cluster of a state directory: what is written down of it, and what is left of it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.config import Config

FILE, LOCK = "running.json", "lock"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Running:
    """A cluster that is up or starting."""

    pid: int  # of its supervisor, and the id of the session in which all its processes are
    boot_id: str  # of the machine's start: process ids begin anew with the next
    ray_dir: str  # in /tmp, because the paths of Ray's sockets must be short
    model: str
    started: float  # on time.time's clock
    address: str | None = None  # host:port of the gateway; None while it starts

    @staticmethod
    def this_process(config: Config) -> Running:
        """The cluster that this supervisor is about to start, with a folder for Ray."""
        return Running(
            pid=os.getpid(),
            boot_id=_boot_id(),
            ray_dir=tempfile.mkdtemp(prefix="briolette-", dir="/tmp"),
            model=config.model_id,
            started=psutil.Process().create_time(),
        )

    @staticmethod
    def read(state_dir: Path) -> Running | None:
        """What was written last, whether or not it still runs."""
        try:
            return Running(**json.loads((state_dir / FILE).read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def write(self, state_dir: Path) -> None:
        write_private(state_dir / FILE, json.dumps(asdict(self)))

    def clean_up(self, state_dir: Path) -> None:
        """Kill every process of the cluster but this one, keep Ray's logs, forget the rest.

        A session's id is not given away while the session has processes, so none but ours are hit.
        """
        if self.boot_id == _boot_id():
            _kill_session(self.pid)
        _keep_logs(Path(self.ray_dir), state_dir / "logs" / "ray")
        shutil.rmtree(self.ray_dir, ignore_errors=True)
        (state_dir / FILE).unlink(missing_ok=True)


def is_locked(state_dir: Path) -> bool:
    """Whether a supervisor lives; it may have written nothing yet."""
    try:
        with open(state_dir / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


def write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read; a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)


def _kill_session(session_id: int) -> None:
    left = [process for process in psutil.process_iter() if _is_left(process, session_id)]
    for process in left:
        log.info("Killing %d, which is left over.", process.pid)
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)


def _is_left(process: psutil.Process, session_id: int) -> bool:
    try:
        return process.pid != os.getpid() and os.getsid(process.pid) == session_id
    except ProcessLookupError:
        return False


def _keep_logs(ray_dir: Path, kept: Path) -> None:
    """The logs of the last run only."""
    shutil.rmtree(kept, ignore_errors=True)
    for session in ray_dir.glob("session_*"):
        if not session.is_symlink() and (session / "logs").is_dir():
            shutil.copytree(session / "logs", kept, symlinks=True, dirs_exist_ok=True)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
