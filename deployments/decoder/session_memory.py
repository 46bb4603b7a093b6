"""The decoder's side of kept sessions: what memory holds for them, and its release."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from engine.request import Request
from protos.briolette.v1.stream_pb2 import (
    Failure,
    Missing,
    SessionAnswer,
    SessionCall,
    SessionTrace,
)

FLUSH_S = 30.0  # for all that waits to be written to the store

Task = Callable[[], None]


class SessionEngine(Protocol):
    """What is needed of engine.core.EngineCore."""

    def drop_session(self, tenant: str, session: str) -> int: ...
    def session_tokens(self, tenant: str) -> dict[str, int]: ...


class KeptValues(Protocol):
    """What is needed of the store that the engine saves its blocks in."""

    @property
    def fingerprint(self) -> bytes:
        """Of all that a value depends on but the tokens."""

    def keys_of(self, request: Request) -> tuple[bytes, ...]:
        """Of the values from which a conversation resumes that goes on after this request."""

    def traces_of(self, request: Request) -> tuple[bytes, ...]:
        """Of all values that this request may have left in the store."""

    def forget(self, tenant: str, keys: Iterable[bytes]) -> None:
        """These values aren't there: save them again when they come by."""

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was saved is written or given up; whether that came in time."""


class SessionMemory:
    """Answers session calls between two steps; what has to wait does so in a thread of its own."""

    def __init__(
        self,
        engine: SessionEngine,
        store: KeptValues | None,
        between_steps: Callable[[Task], None],
    ) -> None:
        """Without a store sessions are messages only, and each turn may have to be computed."""
        self._engine = engine
        self._store = store
        self._between_steps = between_steps
        self.fingerprint = "" if store is None else store.fingerprint.hex()

    def trace(self, request: Request) -> SessionTrace | None:
        """What a turn that has ended, in whatever way, has left in the store."""
        if request.session is None or self._store is None:
            return None
        keys = self._store.traces_of(request)
        return SessionTrace(tenant=request.tenant, session=request.session, keys=keys)

    def keys_of(self, request: Request) -> tuple[bytes, ...]:
        """Of the values that the request's session needs after this turn."""
        if request.session is None or self._store is None:
            return ()
        return self._store.keys_of(request)

    def forget(self, missing: Missing) -> None:
        """What a gateway has found missing in the store, or has removed."""
        if self._store is not None:
            self._store.forget(missing.tenant, missing.keys)

    def answer(self, call: SessionCall, reply: Callable[[SessionAnswer], None]) -> None:
        """Between two steps; so is `reply` called, at once or later."""
        if not call.park:
            reply(self._in_memory(call))
        elif self._store is None:
            reply(self._parked(call))
        else:
            threading.Thread(
                target=self._park_written,
                args=(self._store, call, reply),
                name="session flush",
                daemon=True,
            ).start()

    def _park_written(
        self, store: KeptValues, call: SessionCall, reply: Callable[[SessionAnswer], None]
    ) -> None:
        is_written = store.flush(FLUSH_S)
        self._between_steps(lambda: reply(self._parked(call) if is_written else _not_written(call)))

    def _parked(self, call: SessionCall) -> SessionAnswer:
        freed_bytes = self._engine.drop_session(call.tenant, call.park)
        answer = self._in_memory(call)
        answer.freed_bytes = freed_bytes
        return answer

    def _in_memory(self, call: SessionCall) -> SessionAnswer:
        tokens = self._engine.session_tokens(call.tenant)
        return SessionAnswer(call_id=call.call_id, tokens_in_memory=tokens)


def _not_written(call: SessionCall) -> SessionAnswer:
    failure = Failure(
        status="UNAVAILABLE",
        sentence=f"The store took more than {FLUSH_S:g} s for what waits to be written; try again.",
    )
    return SessionAnswer(call_id=call.call_id, failure=failure)
