"""The cluster of a state directory: start it, find it, stop it, and leave nothing of it behind."""

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
STOP_S = 45.0  # for a clean end; then it is killed
KILL_S = 5.0  # for the end of what was killed
LOCK_S = 2.0  # somebody who only looks holds the lock for a moment, one who cleans up for longer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Running:
    """What is written down of a cluster that is up or starting."""

    pid: int  # of its supervisor, and the id of the session in which all its processes are
    boot_id: str  # of the machine's start: process ids begin anew with the next
    ray_dir: str  # in /tmp, because the paths of Ray's sockets must be short
    model: str
    started: float  # on time.time's clock
    address: str | None = None  # host:port of the gateway; None while it starts
    base_url: str | None = None  # of its HTTP

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


def find_running(state_dir: Path) -> Running | None:
    """The live cluster of a state directory."""
    return Running.read(state_dir) if is_locked(state_dir) else None


def start(config: Config, on_news: Callable[[dict[str, Any]], None]) -> Running:
    """Start a cluster that outlives this process, and wait until it serves.

    `on_news` gets {"phase": sentence}, {"warning": sentence} and {"parts": {name: progress}}.
    Raises Unavailable with the reason when it can't; interrupted, it leaves nothing behind.
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
            start_new_session=True,  # Ctrl-C in the terminal is for us alone
        )
    os.close(write_fd)
    try:
        _send_settings(process, config)
        with os.fdopen(read_fd) as pipe:
            for line in pipe:
                news = json.loads(line)
                if "error" in news:
                    process.wait(STOP_S)
                    raise Unavailable(news["error"])
                on_news(news)
    except BaseException:
        _end(process.pid)
        clean_up(config.state_dir)
        raise
    running = find_running(config.state_dir)
    if running is None or running.address is None:
        process.wait(STOP_S)
        raise Unavailable(f"The cluster ended while it started; see {config.state_dir}/logs.")
    return running


def _send_settings(process: subprocess.Popen[bytes], config: Config) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as pipe:  # of a supervisor that is gone already
        pipe.write(json.dumps(config.to_dict()).encode())


def stop(state_dir: Path) -> bool:
    """End the cluster of a state directory; False when there was none.

    Raises Unavailable when its supervisor doesn't even end when killed.
    """
    running = find_running(state_dir)
    if running is not None and not _end(running.pid):
        raise Unavailable(f"The supervisor, process {running.pid}, does not end; kill it.")
    return clean_up(state_dir) or running is not None


def clean_up(state_dir: Path) -> bool:
    """Remove what a supervisor that was killed itself has left behind; True if there was any."""
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
    """The lock that says that a cluster of this state directory is alive; ends with the process.

    Raises AlreadyRunning.
    """
    give_up_at = time.monotonic() + LOCK_S
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
    """Whether a supervisor lives; it may have written nothing yet."""
    try:
        with open(state_dir / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # two who look don't see each other
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


def _end(pid: int) -> bool:
    """SIGTERM, patience, SIGKILL; whether it has ended."""
    try:
        process = psutil.Process(pid)
        process.terminate()
        _, alive = psutil.wait_procs([process], timeout=STOP_S)
        if alive:
            process.kill()
            _, alive = psutil.wait_procs([process], timeout=KILL_S)
        return not alive
    except psutil.NoSuchProcess:
        return True


def _kill_session(session_id: int) -> None:
    """Kill until two looks in a row find none: one process may start another and end while the
    list is made, so that neither is on it.
    """
    num_empty = 0
    for _ in range(20):
        left = [process for process in psutil.process_iter() if _is_left(process, session_id)]
        num_empty = 0 if left else num_empty + 1
        if num_empty == 2:
            return
        for process in left:
            log.info("Killing %d, which is left over.", process.pid)
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=KILL_S)
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
    """The logs of the last run only."""
    shutil.rmtree(kept, ignore_errors=True)
    for session in ray_dir.glob("session_*"):
        if not session.is_symlink() and (session / "logs").is_dir():
            shutil.copytree(session / "logs", kept, symlinks=True, dirs_exist_ok=True)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _python_path() -> str:
    inherited = os.environ.get("PYTHONPATH", "")
    return f"{ROOT}{os.pathsep}{inherited}" if inherited else str(ROOT)
