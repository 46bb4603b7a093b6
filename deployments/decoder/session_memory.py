"""The decoder's side of sessions: the tokens that memory holds for them, and parking."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from engine.core import EngineCore
from engine.request import Request
from protos.briolette.v1.stream_pb2 import (
    Failure,
    Missing,
    SessionAnswer,
    SessionCall,
    SessionTrace,
)

FLUSH_S = 30.0  # for the values that wait to be written to the store

Task = Callable[[], None]


class SessionStore(Protocol):
    """The part of `KVBlockStore` that sessions need; tests have a store in memory."""

    @property
    def fingerprint(self) -> bytes:
        """A hash of all that a value depends on but the tokens."""

    def keys_of(self, request: Request) -> tuple[bytes, ...]:
        """Return the keys of the values from which the next turn resumes."""

    def traces_of(self, request: Request) -> tuple[bytes, ...]:
        """Return the keys of all values that this request may have left in the store."""

    def forget(self, tenant: str, keys: Iterable[bytes]) -> None:
        """Assume that these values are not in the store: they are saved again when computed."""

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was saved is written or given up; False if that takes longer."""


class SessionMemory:
    """Answers the gateways' session calls between two steps; waits for the store in a thread."""

    def __init__(
        self,
        engine: EngineCore,
        store: SessionStore | None,
        between_steps: Callable[[Task], None],
    ) -> None:
        """Take the engine that holds sessions in memory.

        Args:
            engine: used in the step thread only.
            store: the engine's store; None means that a turn may be computed anew from its text.
            between_steps: runs a task in the step thread, soon. Any thread may call it.
        """
        self._engine = engine
        self._store = store
        self._between_steps = between_steps
        self.fingerprint = "" if store is None else store.fingerprint.hex()

    def trace(self, request: Request) -> SessionTrace | None:
        """Return the keys that an ended turn has left in the store; None outside of sessions."""
        if request.session is None or self._store is None:
            return None
        keys = self._store.traces_of(request)
        return SessionTrace(tenant=request.tenant, session=request.session, keys=keys)

    def keys_of(self, request: Request) -> tuple[bytes, ...]:
        """Return the keys of the values that the request's session needs after this turn."""
        if request.session is None or self._store is None:
            return ()
        return self._store.keys_of(request)

    def forget(self, missing: Missing) -> None:
        """Assume that values are gone which a gateway has missed in the store, or removed."""
        if self._store is not None:
            self._store.forget(missing.tenant, missing.keys)

    def answer(self, call: SessionCall, reply: Callable[[SessionAnswer], None]) -> None:
        """Answer a call; `reply` runs in the step thread, at once or after a flush of the store."""
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
        self, store: SessionStore, call: SessionCall, reply: Callable[[SessionAnswer], None]
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
        sentence=f"Writing the session to the store takes more than {FLUSH_S:g} s; try again.",
    )
    return SessionAnswer(call_id=call.call_id, failure=failure)
