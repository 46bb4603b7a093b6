"""Requests with a format wait here until it is compiled, which may take a second: beside the steps,
and without a delay for anybody else.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from cluster.errors import Overloaded
from deployments.messages import to_sampling_params
from engine.text.grammar import Grammar
from protos.briolette.v1.stream_pb2 import Add, ToDecoder

MAX_WAITING = 256  # calls of a tenant; the answers to one come together


class Compiler(Protocol):
    """What is needed of engine.text.grammar.Grammars."""

    def compile(self, grammar: Grammar) -> None: ...
    def is_compiled(self, grammar: Grammar) -> bool: ...


@dataclass(slots=True)
class Arrival:
    """What a gateway sent, and when. Requests that were `dropped` since are not to be taken in."""

    gateway_id: int
    message: ToDecoder
    arrived_s: float = field(default_factory=time.monotonic)
    dropped: set[str] = field(default_factory=set)


class FormatQueue:
    """Compiles in a thread of its own, for one tenant after the other. Any thread may call."""

    def __init__(self, compiler: Compiler | None, on_compiled: Callable[[Arrival], None]) -> None:
        """Without a compiler nothing waits: an engine without a tokenizer refuses all formats.

        `on_compiled` takes what has waited, also where its format is wrong. It must not wait:
        what is dropped later is dropped by whoever took it.
        """
        self._compiler, self._on_compiled = compiler, on_compiled
        self._queues: dict[str, deque[Arrival]] = {}  # by tenant, the next one first
        self._waiting: dict[str, Arrival] = {}  # by request
        self._changed = threading.Condition()
        self._is_running = True
        self._thread = threading.Thread(target=self._run, name="formats", daemon=True)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Compile nothing more; what waits is forgotten."""
        with self._changed:
            self._is_running = False
            self._changed.notify()

    def hold(self, arrival: Arrival) -> bool:
        """Whether its requests, all of one format, have to wait, as they do from now on.

        Raises Overloaded where too many of that tenant's wait already.
        """
        adds = arrival.message.adds
        if not adds or not self._needs_compiling(adds[0]):  # the others share its format
            return False
        with self._changed:
            queue = self._queues.setdefault(adds[0].tenant, deque())
            if len(queue) >= MAX_WAITING:
                raise Overloaded(
                    f"{len(queue)} of your calls wait for their formats to be compiled, the most "
                    "that may; try again later."
                )
            queue.append(arrival)
            self._waiting |= {add.request_id: arrival for add in adds}
            self._changed.notify()
        return True

    def drop(self, request_ids: Iterable[str]) -> None:
        """Nobody wants these any more; those that don't wait here are ignored."""
        with self._changed:
            for request_id in request_ids:
                if (arrival := self._waiting.pop(request_id, None)) is not None:
                    arrival.dropped.add(request_id)

    def drop_gateway(self, gateway_id: int) -> None:
        """The same for all that came from there."""
        with self._changed:
            waiting = list(self._waiting.items())
        self.drop(rid for rid, arrival in waiting if arrival.gateway_id == gateway_id)

    def _needs_compiling(self, add: Add) -> bool:
        if self._compiler is None or add.sampling.WhichOneof("format") is None:
            return False
        try:
            grammar = to_sampling_params(add.sampling).grammar
            return grammar is not None and not self._compiler.is_compiled(grammar)
        except Exception:  # whatever it is, it comes again, and is told, when it is taken in
            return False

    def _run(self) -> None:
        while (arrival := self._next()) is not None:
            adds = arrival.message.adds
            if len(arrival.dropped) < len(adds):
                with suppress(Exception):  # it comes again, and is told, when it is taken in
                    grammar = to_sampling_params(adds[0].sampling).grammar
                    if self._compiler is not None and grammar is not None:
                        self._compiler.compile(grammar)
            with self._changed:  # so that one who drops it finds it here or with its taker
                for add in adds:
                    self._waiting.pop(add.request_id, None)
                self._on_compiled(arrival)

    def _next(self) -> Arrival | None:
        """The tenants in turn; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queues or not self._is_running)
            if not self._is_running:
                return None
            tenant = next(iter(self._queues))
            queue = self._queues.pop(tenant)
            arrival = queue.popleft()
            if queue:
                self._queues[tenant] = queue
            return arrival
