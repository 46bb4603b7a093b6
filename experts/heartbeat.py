"""Signs of life: a host that computes for long says so, lest its router take it for dead."""

from __future__ import annotations

import threading

from cluster.errors import LinkError
from cluster.links.connect import Link
from experts import wire

SEND_TIMEOUT_S = 10.0  # for a router to take a heartbeat


class Heartbeat:
    """Tells one router, every `interval_s`, which call is still being computed, if any.

    It runs in a thread of its own, since the one that computes can't; a process that is stopped or
    dead sends nothing. Use it as a context manager, and close the link before leaving.
    """

    def __init__(self, link: Link, interval_s: float) -> None:
        self.call_id: int | None = None  # the call that is being computed
        self._link, self._interval_s = link, interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="expert-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # The link is closed by now, so no send blocks.
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        before = None
        while not self._ended.wait(self._interval_s):
            call_id = self.call_id
            if call_id is not None and call_id == before:  # short calls cost no frame
                try:
                    self._link.send(wire.encode_computing(call_id), SEND_TIMEOUT_S)
                except LinkError:
                    return  # the thread that computes will see it too
            before = call_id
