"""An expert host in a process of its own that answers later than it could, for bench.overlap."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import secrets
import threading
import time
from collections.abc import Iterator
from typing import Any

from bench.lib.models import BenchModel
from cluster.checkpoint import Checkpoint
from cluster.errors import LinkError
from cluster.links.connect import Endpoint, Link
from cluster.placement import ExpertGroups, ExpertPlacement
from cluster.spec import ModelSpec
from experts.heartbeat import Heartbeat
from experts.host import REPLY_TIMEOUT_S, ExpertHost
from experts.host_process import serve_host
from experts.router import ExpertRouter

HOST_ID = "host0"
START_S = 60.0
SPIN_S = 0.0003  # a sleep may end so much too late; this much is spun through


class InjectedHost(ExpertHost):
    """Delayed: every answer leaves `delay_s` after its call came, and calls don't wait for each
    other: a far network. Paced: a call takes `s_per_row` for each of its rows, one call at a time:
    a slow card or a thin wire.
    """

    def __init__(
        self, *args: Any, delay_s: float, s_per_row: float, core: int, **options: Any
    ) -> None:
        os.sched_setaffinity(0, {core})
        super().__init__(*args, **options)
        self._delay_s, self._s_per_row = delay_s, s_per_row
        self._row_bytes = 4 * self._spec.hidden_size
        self._late: queue.SimpleQueue[tuple[float, Link, list[memoryview]]] = queue.SimpleQueue()
        threading.Thread(target=self._send_late, daemon=True).start()

    def reply(self, link: Link, frame: memoryview, heartbeat: Heartbeat) -> None:
        """Compute at once, and answer when the time has come."""
        came_s, num_rows = time.monotonic(), len(frame) // self._row_bytes
        parts = self.answer(frame)
        _sleep_until(came_s + self._s_per_row * num_rows)
        self._late.put((came_s + self._delay_s, link, parts))

    def _send_late(self) -> None:
        while True:
            due_s, link, parts = self._late.get()
            _sleep_until(due_s)
            with contextlib.suppress(LinkError):
                link.send(parts, REPLY_TIMEOUT_S)


@contextlib.contextmanager
def injected_router(
    model: BenchModel, core: int, delay_s: float = 0.0, s_per_row: float = 0.0
) -> Iterator[ExpertRouter]:
    """A router to such a host, which holds every group and has a core of its own."""
    spec = ModelSpec.load(model.model_dir)
    placement = ExpertPlacement.spread(ExpertGroups(spec.num_experts, 4), [HOST_ID])
    secret = secrets.token_bytes(16)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=serve_host,
        args=(InjectedHost, theirs, HOST_ID, model.model_dir, placement, secret),
        kwargs={"delay_s": delay_s, "s_per_row": s_per_row, "core": core, "num_threads": 1},
        daemon=True,
    )
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_S):
            raise TimeoutError("the expert host didn't start")
        endpoints = {HOST_ID: Endpoint.from_dict(ours.recv())}
        fingerprint = Checkpoint(model.model_dir).fingerprint
        with ExpertRouter(
            spec, placement, endpoints, secret=secret, weights_hash=fingerprint, timeout_s=10.0
        ) as router:
            router.wait_ready(START_S)
            yield router
    finally:
        ours.close()  # the host ends with it
        process.join(10.0)
        if process.is_alive():
            process.kill()


def _sleep_until(due_s: float) -> None:
    time.sleep(max(0.0, due_s - SPIN_S - time.monotonic()))
    while time.monotonic() < due_s:
        pass
