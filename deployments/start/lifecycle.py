"""The cluster of a state directory: start, find and stop it, and leave nothing of it behind."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.config import Config
from cluster.errors import AlreadyRunning, Unavailable
from cluster.files import write_private

ROOT = Path(__file__).resolve().parents[2]  # where our packages are
FILE, LOCK = "running.json", "lock"
STOP_TIMEOUT_S = 45.0  # for a clean end; then the process is killed
KILL_TIMEOUT_S = 5.0  # for the end of a killed process
LOCK_TIMEOUT_S = 2.0  # `is_locked` holds the lock for a moment, a cleanup for longer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Running:
    """What the state directory says about a cluster that is up or starting."""

    pid: int  # of the supervisor; also the id of the Unix session of all processes
    boot_id: str  # of the machine's boot, after which process ids mean other processes
    ray_dir: str  # in /tmp, because the paths of Ray's sockets must be short
    model: str
    started: float  # on time.time's clock
    address: str | None = None  # host:port of the gateway; None while it starts
    base_url: str | None = None  # of its HTTP

    @staticmethod
    def this_process(config: Config) -> Running:
        """Describe the cluster that this process is about to start, and create Ray's folder."""
        return Running(
            pid=os.getpid(),
            boot_id=_boot_id(),
            ray_dir=tempfile.mkdtemp(prefix="briolette-", dir="/tmp"),
            model=config.model_id,
            started=psutil.Process().create_time(),
        )

    @staticmethod
    def read(state_dir: Path) -> Running | None:
        """Return what was written last, whether or not it still runs; None if nothing was."""
        try:
            return Running(**json.loads((state_dir / FILE).read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def write(self, state_dir: Path) -> None:
        """Write to the state directory, where `read` finds it."""
        write_private(state_dir / FILE, json.dumps(asdict(self)))

    def clean_up(self, state_dir: Path) -> None:
        """Kill every process of the cluster but this one, keep Ray's logs, delete its other files.

        Linux doesn't reuse the id of a session that has processes, so no other process is killed.
        """
        if self.boot_id == _boot_id():
            _kill_session(self.pid)
        _keep_logs(Path(self.ray_dir), state_dir / "logs" / "ray")
        shutil.rmtree(self.ray_dir, ignore_errors=True)
        (state_dir / FILE).unlink(missing_ok=True)


def find_running(state_dir: Path) -> Running | None:
    """Return the cluster that is alive in a state directory, if any."""
    return Running.read(state_dir) if is_locked(state_dir) else None


def start(config: Config, on_progress: Callable[[dict[str, Any]], None]) -> Running:
    """Start a cluster that outlives this process, and wait until it serves.

    An interrupt stops everything that was started.

    Args:
        config: The configuration of the cluster.
        on_progress: Called with {"phase": sentence}, {"warning": sentence} or
            {"parts": {part: progress from 0 to 1}}.

    Raises:
        Unavailable: The cluster can't start, with the reason.
    """
    (config.state_dir / "logs").mkdir(parents=True, exist_ok=True)
    read_fd, write_fd = os.pipe()
    with open(config.state_dir / "logs" / "output.log", "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "deployments.start.supervisor", str(write_fd)],
            cwd="/",
            env={**os.environ, "PYTHONPATH": _python_path()},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[write_fd],
            start_new_session=True,  # Ctrl-C in the terminal reaches this process only
        )
    os.close(write_fd)
    try:
        _send_settings(process, config)
        with os.fdopen(read_fd) as pipe:
            for line in pipe:
                progress = json.loads(line)
                if "error" in progress:
                    process.wait(STOP_TIMEOUT_S)
                    raise Unavailable(progress["error"])
                on_progress(progress)
    except BaseException:
        _end(process.pid)
        clean_up(config.state_dir)
        raise
    running = find_running(config.state_dir)
    if running is None or running.address is None:
        process.wait(STOP_TIMEOUT_S)
        raise Unavailable(
            f"The cluster stopped while it was starting; see {config.state_dir}/logs."
        )
    return running


def _send_settings(process: subprocess.Popen[bytes], config: Config) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as pipe:  # the supervisor is gone already
        pipe.write(json.dumps(config.to_dict()).encode())


def stop(state_dir: Path) -> bool:
    """Stop the cluster of a state directory; returns False if there is none.

    Raises:
        Unavailable: The supervisor doesn't end, even when killed.
    """
    running = find_running(state_dir)
    if running is not None and not _end(running.pid):
        raise Unavailable(f"The supervisor, process {running.pid}, does not end; kill it.")
    return clean_up(state_dir) or running is not None


def clean_up(state_dir: Path) -> bool:
    """Remove the processes and files that a killed supervisor has left; True if there were any."""
    if Running.read(state_dir) is None:
        return False
    try:
        with holding(state_dir):
            running = Running.read(state_dir)
            if running is not None:
                running.clean_up(state_dir)
            return running is not None
    except AlreadyRunning:
        return False


@contextmanager
def holding(state_dir: Path) -> Iterator[None]:
    """Hold the lock of a state directory, which marks its cluster as alive, in a `with` block.

    It ends with the process at the latest.

    Raises:
        AlreadyRunning: Another process holds it.
    """
    give_up_at = time.monotonic() + LOCK_TIMEOUT_S
    with open(state_dir / LOCK, "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up_at:
                    raise AlreadyRunning(
                        f"A cluster with the state_dir {state_dir} is already running."
                    ) from None
            time.sleep(0.1)
        yield


def is_locked(state_dir: Path) -> bool:
    """Return whether a supervisor is alive; it may have written no file yet."""
    try:
        with open(state_dir / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # two calls don't collide
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


def _end(pid: int) -> bool:
    """Send SIGTERM, then after a while SIGKILL; return whether the process has ended."""
    try:
        process = psutil.Process(pid)
        process.terminate()
        _, alive = psutil.wait_procs([process], timeout=STOP_TIMEOUT_S)
        if alive:
            process.kill()
            _, alive = psutil.wait_procs([process], timeout=KILL_TIMEOUT_S)
        return not alive
    except psutil.NoSuchProcess:
        return True


def _kill_session(session_id: int) -> None:
    """Kill all processes of a Unix session, until two lists in a row are empty.

    A process may start another one and end while a list is made, so that neither is on it.
    """
    num_empty = 0
    for _ in range(20):
        left = [process for process in psutil.process_iter() if _is_left(process, session_id)]
        num_empty = 0 if left else num_empty + 1
        if num_empty == 2:
            return
        for process in left:
            log.info("Killing process %d, which was left behind.", process.pid)
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=KILL_TIMEOUT_S)
        time.sleep(0.05)


def _is_left(process: psutil.Process, session_id: int) -> bool:
    try:
        return (
            process.pid != os.getpid()
            and os.getsid(process.pid) == session_id
            and process.status() != psutil.STATUS_ZOMBIE
        )
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def _keep_logs(ray_dir: Path, kept: Path) -> None:
    """Copy Ray's logs to `kept`, in place of those of an earlier run."""
    shutil.rmtree(kept, ignore_errors=True)
    for session in ray_dir.glob("session_*"):
        if not session.is_symlink() and (session / "logs").is_dir():
            shutil.copytree(session / "logs", kept, symlinks=True, dirs_exist_ok=True)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _python_path() -> str:
    inherited = os.environ.get("PYTHONPATH", "")
    return f"{ROOT}{os.pathsep}{inherited}" if inherited else str(ROOT)
