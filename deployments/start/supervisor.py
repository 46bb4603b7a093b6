"""The process behind `briolette up`: owns Ray, says how the start goes, stays, cleans up.

Run as `python -m deployments.start.supervisor PIPE`: where one JSON object for each piece of news
goes. The configuration comes as JSON on the standard input: anybody can read a command line, and it
may hold a password.
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
    """`briolette down` or Ctrl-C: raised wherever the main thread is, as KeyboardInterrupt is."""


class News:
    """The pipe to the process that started us; it may close its end at any time."""

    def __init__(self, fd: int) -> None:
        self._pipe: Any = os.fdopen(fd, "w", buffering=1)

    def tell(self, **news: Any) -> None:
        try:
            self._pipe.write(json.dumps(news) + "\n")
        except (BrokenPipeError, ValueError):
            self.close()

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._pipe.close()


def main() -> int:
    config, news = Config.from_dict(json.load(sys.stdin)), News(int(sys.argv[1]))
    catch_signals()
    assert os.getsid(0) == os.getpid(), "the supervisor leads a session of its own"
    log_to(config.state_dir, "supervisor")
    give_way()
    try:
        with holding(config.state_dir):
            supervise(config, news)
    except Stopped:
        news.tell(error="The start was interrupted.")
    except BrioletteError as error:
        log.error("%s", error)
        news.tell(error=str(error))
        return 1
    except Exception as error:  # the border of a start
        log.exception("The cluster could not start.")
        news.tell(
            error=f"{type(error).__name__}: {error} "
            f"({config.state_dir}/logs/supervisor.log has more)"
        )
        return 1
    return 0


def supervise(config: Config, news: News) -> None:
    """From nothing to SERVING, and from the signal to stop back to nothing."""
    left_over = Running.read(config.state_dir)
    if left_over is not None:
        left_over.clean_up(config.state_dir)
    running = Running.this_process(config)
    running.write(config.state_dir)  # from now on `down` finds us
    try:
        is_here = Path(config.model_source).is_dir()
        news.tell(phase="Checking the model" if is_here else f"Fetching {config.model}")
        spec = check(config)
        prepare_environment(config)
        clear_reports(config.state_dir)
        news.tell(phase="Starting Ray")
        with store_server(config, partial(warn, news)), ray_cluster(config, Path(running.ray_dir)):
            catch_signals()  # Ray has put its own handlers in place of ours
            from deployments.app import build

            news.tell(phase="Starting the parts")
            run_app(build(config, spec, secrets.token_bytes(32), num_gpus()))
            gateway = wait_until_serving(config, news)
            running = replace(running, address=gateway.address, base_url=gateway.base_url)
            running.write(config.state_dir)
            news.tell(serving=gateway.address)
            news.close()
            while True:
                signal.pause()  # until Stopped
    finally:
        running.clean_up(config.state_dir)


def warn(news: News, sentence: str) -> None:
    """Something that the cluster starts without."""
    log.warning("%s", sentence)
    news.tell(warning=sentence)


def wait_until_serving(config: Config, news: News) -> StartReport:
    """The gateway's report, once it says SERVING. Raises what kept a part from starting, or
    Unavailable when nothing moves for `ray.start_timeout_s`.
    """
    give_up_at = time.monotonic() + config.ray.start_timeout_s
    told: list[StartReport] = []
    next_check = 0.0
    while time.monotonic() < give_up_at:
        time.sleep(POLL_S)
        reports = read_reports(config.state_dir)
        for report in reports:
            if report.error is not None:
                raise Unavailable(report.error)
        if reports != told:
            told = reports
            give_up_at = time.monotonic() + config.ray.start_timeout_s
            news.tell(parts={report.part: report.progress for report in reports})
        if time.monotonic() > next_check:
            check_app()
            next_check = time.monotonic() + 1.0
        for report in reports:  # only the gateway's has an address
            if report.address and is_serving(local_target(config.state_dir, report.address)):
                return report
    raise Unavailable(
        f"The start made no progress for {config.ray.start_timeout_s:g} s (ray.start_timeout_s); "
        f"{config.state_dir}/logs has the logs of its parts."
    )


def is_serving(target: str) -> bool:
    """What the gateway's health service says."""
    with grpc.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=1.0)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def catch_signals() -> None:
    """`down` sends SIGTERM. The first one counts: what follows must not break the cleaning up."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise_stopped)


def _raise_stopped(*_: object) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise Stopped


if __name__ == "__main__":
    sys.exit(main())
