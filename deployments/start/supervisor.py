"""The process behind `briolette up`: starts and owns the cluster, and cleans up at its end.

Run as `python -m deployments.start.supervisor FD`, with the file descriptor of a pipe that takes
the progress of the start, a JSON object per line. The configuration comes as JSON on the standard
input: it may hold a password, and every user can read a command line.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.config import Config
from cluster.errors import BrioletteError, Unavailable
from deployments.process.local_access import local_target
from deployments.process.priority import give_way
from deployments.process.report import StartReport, clear_reports, log_to, read_reports
from deployments.redis_store import store_server
from deployments.start.lifecycle import Running, holding
from deployments.start.preflight import check
from deployments.start.ray_cluster import (
    check_app,
    num_gpus,
    prepare_environment,
    ray_cluster,
    run_app,
)

POLL_S = 0.1

log = logging.getLogger(__name__)


class Stopped(BaseException):
    """Raised in the main thread by `briolette down` or Ctrl-C, as KeyboardInterrupt is."""


class StartProgress:
    """The pipe to the process that started this one, which may close its end at any time."""

    def __init__(self, fd: int) -> None:
        self._pipe: Any = os.fdopen(fd, "w", buffering=1)

    def report(self, **progress: Any) -> None:
        """Write one JSON object; see `deployments.start.lifecycle.start` for its keys."""
        try:
            self._pipe.write(json.dumps(progress) + "\n")
        except (BrokenPipeError, ValueError):
            self.close()

    def close(self) -> None:
        """Let the other end of the pipe read its end."""
        with suppress(BrokenPipeError):
            self._pipe.close()


def main() -> int:
    """Run the cluster until it is stopped; returns the exit code."""
    config, progress = Config.from_dict(json.load(sys.stdin)), StartProgress(int(sys.argv[1]))
    catch_signals()
    assert os.getsid(0) == os.getpid(), "the supervisor leads a session of its own"
    log_to(config.state_dir, "supervisor")
    give_way()
    try:
        with holding(config.state_dir):
            supervise(config, progress)
    except Stopped:
        progress.report(error="The start was interrupted.")
    except BrioletteError as error:
        log.error("%s", error)
        progress.report(error=str(error))
        return 1
    except Exception as error:  # border: the start of a cluster
        log.exception("The cluster could not start.")
        progress.report(
            error=f"{type(error).__name__}: {error} (see {config.state_dir}/logs/supervisor.log)"
        )
        return 1
    return 0


def supervise(config: Config, progress: StartProgress) -> None:
    """Start the cluster, wait for the signal to stop, and leave nothing of it behind."""
    left_over = Running.read(config.state_dir)
    if left_over is not None:
        left_over.clean_up(config.state_dir)
    running = Running.this_process(config)
    running.write(config.state_dir)  # from now on `down` finds us
    try:
        is_here = Path(config.model_source).is_dir()
        progress.report(phase="Checking the model" if is_here else f"Fetching {config.model}")
        spec = check(config)
        prepare_environment(config)
        clear_reports(config.state_dir)
        progress.report(phase="Starting Ray")
        with (
            store_server(config, partial(warn, progress)),
            ray_cluster(config, Path(running.ray_dir)),
        ):
            catch_signals()  # Ray has replaced our handlers
            from deployments.app import build  # imports ray, after `prepare_environment`

            progress.report(phase="Starting the parts")
            run_app(build(config, spec, secrets.token_bytes(32), num_gpus()))
            gateway = wait_until_serving(config, progress)
            running = replace(running, address=gateway.address, base_url=gateway.base_url)
            running.write(config.state_dir)
            progress.report(serving=gateway.address)
            progress.close()
            while True:
                signal.pause()  # until Stopped
    finally:
        running.clean_up(config.state_dir)


def warn(progress: StartProgress, sentence: str) -> None:
    """Log and report a problem that the cluster can start with."""
    log.warning("%s", sentence)
    progress.report(warning=sentence)


def wait_until_serving(config: Config, progress: StartProgress) -> StartReport:
    """Return the gateway's report once its health is SERVING.

    Raises:
        Unavailable: A part couldn't start, or nothing moved for `ray.start_timeout_s`.
    """
    give_up_at = time.monotonic() + config.ray.start_timeout_s
    last_reports: list[StartReport] = []
    check_at = 0.0
    while time.monotonic() < give_up_at:
        time.sleep(POLL_S)
        reports = read_reports(config.state_dir)
        for report in reports:
            if report.error is not None:
                raise Unavailable(report.error)
        if reports != last_reports:
            last_reports = reports
            give_up_at = time.monotonic() + config.ray.start_timeout_s
            progress.report(parts={report.part: report.progress for report in reports})
        if time.monotonic() > check_at:
            check_app()
            check_at = time.monotonic() + 1.0
        for report in reports:  # only the gateway's has an address
            if report.address and is_serving(local_target(config.state_dir, report.address)):
                return report
    raise Unavailable(
        f"The start made no progress for {config.ray.start_timeout_s:g} s (ray.start_timeout_s); "
        f"see {config.state_dir}/logs for the log of each part."
    )


def is_serving(target: str) -> bool:
    """Return whether the gateway's health service answers SERVING."""
    with grpc.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=1.0)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def catch_signals() -> None:
    """Raise Stopped at the first SIGTERM (`briolette down`) or SIGINT; ignore those that follow.

    A second one would interrupt the cleanup.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise_stopped)


def _raise_stopped(*_: object) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise Stopped


if __name__ == "__main__":
    sys.exit(main())
