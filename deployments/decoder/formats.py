"""A queue of requests whose format is being compiled, which may take a second.

Compilation runs beside the steps, so it delays neither them nor requests without a format.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from cluster.errors import Overloaded
from deployments.messages import to_grammar
from engine.text.grammars import Grammars
from protos.briolette.v1.stream_pb2 import Add, ToDecoder

MAX_WAITING = 256  # calls of one tenant; all answers to a call come in one message


@dataclass(slots=True)
class GatewayMessage:
    """A message from a gateway; requests that were `dropped` since then are not to be added."""

    gateway_id: int
    content: ToDecoder
    arrived_at: float = field(default_factory=time.monotonic)
    dropped: set[str] = field(default_factory=set)  # request ids


class FormatQueue:
    """Compiles formats in a thread of its own, tenants in turn. Any thread may call."""

    def __init__(
        self, grammars: Grammars | None, on_compiled: Callable[[GatewayMessage], None]
    ) -> None:
        """Create the queue; it compiles nothing before `start`.

        Args:
            grammars: Compiles; None if the engine has no tokenizer and refuses every format.
            on_compiled: Takes each message that has waited, also if its format is wrong. Must not
                wait. Requests that are dropped after this call are the receiver's to drop.
        """
        self._grammars, self._on_compiled = grammars, on_compiled
        self._queues: dict[str, deque[GatewayMessage]] = {}  # by tenant, the next one first
        self._waiting: dict[str, GatewayMessage] = {}  # by request id
        self._changed = threading.Condition()
        self._is_running = True
        self._thread = threading.Thread(target=self._run, name="formats", daemon=True)

    @property
    def is_alive(self) -> bool:
        """True while the thread that compiles runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread that compiles."""
        self._thread.start()

    def close(self) -> None:
        """End the thread after the format that it compiles now; waiting messages are lost."""
        with self._changed:
            self._is_running = False
            self._changed.notify()

    def hold(self, message: GatewayMessage) -> bool:
        """Queue a message if its format is not compiled yet.

        Returns:
            True if it is queued, False if its requests can be added at once.

        Raises:
            Overloaded: Too many messages of the tenant are queued.
        """
        adds = message.content.adds
        if not adds or not self._needs_compiling(adds[0]):  # all answers to a call share a format
            return False
        with self._changed:
            queue = self._queues.setdefault(adds[0].tenant, deque())
            if len(queue) >= MAX_WAITING:
                raise Overloaded(
                    f"{len(queue)} of your calls are waiting for their formats to be compiled, "
                    "which is the limit. Retry when one of them has finished."
                )
            queue.append(message)
            self._waiting |= {add.request_id: message for add in adds}
            self._changed.notify()
        return True

    def drop(self, request_ids: Iterable[str]) -> None:
        """Drop aborted requests; ids that are not queued are ignored."""
        with self._changed:
            for request_id in request_ids:
                if (message := self._waiting.pop(request_id, None)) is not None:
                    message.dropped.add(request_id)

    def drop_gateway(self, gateway_id: int) -> None:
        """Drop every request of a gateway."""
        with self._changed:
            waiting = list(self._waiting.items())
        self.drop(rid for rid, message in waiting if message.gateway_id == gateway_id)

    def _needs_compiling(self, add: Add) -> bool:
        grammar = to_grammar(add.sampling)
        if self._grammars is None or grammar is None:
            return False
        try:
            return not self._grammars.is_compiled(grammar)
        except Exception:  # border: a gateway's reader; the error is raised again when it is added
            return False

    def _run(self) -> None:
        while (message := self._next()) is not None:
            adds = message.content.adds
            grammar = to_grammar(adds[0].sampling)
            is_wanted = len(message.dropped) < len(adds)
            if self._grammars is not None and grammar is not None and is_wanted:
                # border: a format in its queue; the error is raised again when it is added
                with suppress(Exception):
                    self._grammars.compile(grammar)
            with self._changed:  # a request is always either here or with the receiver
                for add in adds:
                    self._waiting.pop(add.request_id, None)
                self._on_compiled(message)

    def _next(self) -> GatewayMessage | None:
        """Wait for the next tenant's first message; None when the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queues or not self._is_running)
            if not self._is_running:
                return None
            tenant = next(iter(self._queues))
            queue = self._queues.pop(tenant)
            message = queue.popleft()
            if queue:
                self._queues[tenant] = queue
            return message
