"""Signs of life: a host that computes for long says so, lest its router take it for dead."""

from __future__ import annotations

import threading

from cluster.errors import LinkError
from cluster.links.connect import Link
from experts import wire

SEND_S = 10.0  # for a router to take a beat


class Beats:
    """Tells one router, every `beat_s`, which call is still being computed, if any.

    From a thread of its own, since the one that computes can't; a process that is stopped or dead
    says nothing.
    """

    def __init__(self, link: Link, beat_s: float) -> None:
        self.call_id: int | None = None  # the call that is being computed
        self._link, self._beat_s = link, beat_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="expert-beats", daemon=True)

    def __enter__(self) -> Beats:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """The link is closed by now, so that no send lasts."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        before = None
        while not self._ended.wait(self._beat_s):
            call_id = self.call_id
            if call_id is not None and call_id == before:  # short calls cost no frame
                try:
                    self._link.send(wire.encode_computing(call_id), SEND_S)
                except LinkError:
                    return  # the thread that computes will see it too
            before = call_id
