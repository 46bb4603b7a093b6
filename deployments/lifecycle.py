"""Start and stop the cluster of a state directory from a command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from cluster.config import Config
from cluster.errors import Unavailable
from deployments.running import Running, is_locked, write_private

ROOT = Path(__file__).resolve().parent.parent  # where our packages are
STOP_S = 45.0  # for a clean end; then it is killed


def find_running(state_dir: Path) -> Running | None:
    """The live cluster of a state directory."""
    return Running.read(state_dir) if is_locked(state_dir) else None


def start(config: Config, on_news: Callable[[dict[str, Any]], None]) -> Running:
    """Start a cluster that outlives this process, and wait until it serves.

    `on_news` gets {"phase": sentence} and {"parts": {name: progress}}. Raises Unavailable with the
    reason when it can't; interrupted, it leaves nothing behind.
    """
    clean_up(config.state_dir)
    write_private(config.state_dir / "config.json", json.dumps(config.to_dict()))
    (config.state_dir / "logs").mkdir(exist_ok=True)
    read_fd, write_fd = os.pipe()
    with open(config.state_dir / "logs" / "output.log", "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "deployments.supervisor", str(config.state_dir), str(write_fd)],
            cwd="/",
            env={**os.environ, "PYTHONPATH": _python_path()},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[write_fd],
            start_new_session=True,  # Ctrl-C in the terminal is for us alone
        )
    os.close(write_fd)
    try:
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


def stop(state_dir: Path) -> bool:
    """End the cluster of a state directory; False when there was none."""
    running = find_running(state_dir)
    if running is not None:
        _end(running.pid)
    return clean_up(state_dir) or running is not None


def clean_up(state_dir: Path) -> bool:
    """Remove what a supervisor that was killed itself has left behind; True if there was any."""
    running = None if is_locked(state_dir) else Running.read(state_dir)
    if running is not None:
        running.clean_up(state_dir)
    return running is not None


def _end(pid: int) -> None:
    """SIGTERM, patience, SIGKILL."""
    try:
        process = psutil.Process(pid)
        process.terminate()
        process.wait(STOP_S)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        process.kill()


def _python_path() -> str:
    inherited = os.environ.get("PYTHONPATH", "")
    return f"{ROOT}{os.pathsep}{inherited}" if inherited else str(ROOT)
