"""The decoder's step loop: takes messages from gateways, steps the engine, sends what is new."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from functools import partial

from cluster.errors import Overloaded
from deployments.decoder.formats import FormatQueue, GatewayMessage
from deployments.decoder.link import GatewayLinks
from deployments.decoder.meters import EngineMeter
from deployments.decoder.requests import GatewayRequests
from deployments.decoder.session_memory import SessionMemory, SessionStore
from deployments.decoder.status import LoopStatus, TenantLoads
from engine.core import EngineCore
from protos.briolette.v1.admin_pb2 import ClusterStatus
from protos.briolette.v1.stream_pb2 import Failure, FromDecoder, SessionAnswer, ToDecoder

BLOCKS_PERIOD_S = 0.001  # between two polls of a block store while no request can be computed
LONGEST_STEP_S = 120.0  # the largest model's longest prefill on a CPU; past it, the step hangs

log = logging.getLogger(__name__)


class StepLoop:
    """Steps the engine in a thread of its own while it has work; sleeps while it has none."""

    def __init__(
        self,
        *,
        engine: EngineCore,
        meter: EngineMeter,
        fill_status: Callable[[ClusterStatus], None],
        store: SessionStore | None = None,
        on_budget: Callable[[str, int | None], None] = lambda tenant, num_bytes: None,
    ) -> None:
        """Create the loop; it steps after `start`.

        Args:
            engine: Used by the step thread only.
            meter: Counts and times requests and steps.
            fill_status: Writes the model, the experts and readiness into a status. Called in the
                step thread, about once a second; must not wait.
            store: The store of the engine's blocks, if any.
            on_budget: Called with (tenant, bytes that it may keep in the store, or None for the
                usual budget) for every request.
        """
        self._engine, self._meter, self._fill_status = engine, meter, fill_status
        self._gateways: GatewayLinks | None = None
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._formats = FormatQueue(engine.grammars, self._take_later)
        self._sessions = SessionMemory(engine, store, self._tasks.put)
        tenants = TenantLoads(engine.held_bytes)
        self._requests = GatewayRequests(
            engine=engine,
            meter=meter,
            tenants=tenants,
            sessions=self._sessions,
            send=self._send,
            on_budget=on_budget,
        )
        self._status = LoopStatus(engine, meter, tenants, self._fill)
        self._step_started_at: float | None = None  # None between two steps
        self._is_running = True
        self._thread = threading.Thread(target=self._run, name="step loop", daemon=True)
        self._status.measure(self._requests)  # a gateway may come before the first step

    def start(self, gateways: GatewayLinks) -> None:
        """Start to step; `gateways` carry the answers."""
        self._gateways = gateways
        self._formats.start()
        self._thread.start()

    def close(self) -> None:
        """Stop after the step that runs, and end every request with its cost."""
        self._is_running = False
        self._formats.close()
        self.wake()
        self._thread.join(timeout=10)

    # Called from any thread

    @property
    def num_active(self) -> int:
        """The requests that are in the engine."""
        return len(self._requests)

    def problem(self) -> str | None:
        """Return why the decoder should be replaced; None while the loop is well."""
        if not self._thread.is_alive():
            return "The step loop has ended."
        if not self._formats.is_alive:
            return "The thread that compiles formats has ended."
        started_at = self._step_started_at
        if started_at is not None and time.monotonic() - started_at > LONGEST_STEP_S:
            return f"A step has taken more than {LONGEST_STEP_S:g} s."
        return None

    def wake(self) -> None:
        """Measure the status soon, even while idle."""
        self._tasks.put(self._status.expire)

    def greeting(self) -> FromDecoder:
        """Return the first message for a new gateway."""
        return FromDecoder(status=self._status.newest)

    def on_message(self, gateway_id: int, content: ToDecoder) -> None:
        """Take a message from a gateway; requests with a new format wait for its compilation."""
        message = GatewayMessage(gateway_id, content)
        self._formats.drop(content.aborts)
        try:
            if not self._formats.hold(message):
                self._take_later(message)
        except Overloaded as error:
            self._tasks.put(partial(self._requests.refuse_all, message, error))

    def on_lost(self, gateway_id: int) -> None:
        """Drop every request of a gateway that is gone."""
        self._formats.drop_gateway(gateway_id)
        self._tasks.put(partial(self._requests.drop_gateway, gateway_id))

    def _take_later(self, message: GatewayMessage) -> None:
        self._tasks.put(partial(self._take, message))

    # The step thread

    def step_waits(self) -> None:
        """Report that the step is waiting for weights, and start to time it anew."""
        if self._step_started_at is not None:
            self._step_started_at = time.monotonic()
            self._send_status()

    def _run(self) -> None:
        assert self._gateways is not None
        try:
            while self._is_running:
                self._run_tasks()
                if self._engine.has_work:
                    self._step()
                if not self._status.due_in_s:
                    self._send_status()
            sentence = "The decoder is stopping; retry."
            self._requests.fail_all(Failure(status="UNAVAILABLE", sentence=sentence))
        except Exception:  # border: the step thread; `problem` reports its end
            log.exception("The step loop has failed; the decoder must be replaced.")
        finally:
            self._gateways.close()  # ends every stream

    def _run_tasks(self) -> None:
        """Run the tasks that are there; wait for one only while the engine can compute nothing."""
        try:
            if not self._engine.has_work:
                self._tasks.get(timeout=self._status.due_in_s)()
            elif self._engine.waits_for_blocks:
                self._tasks.get(timeout=BLOCKS_PERIOD_S)()
            while True:
                self._tasks.get_nowait()()
        except queue.Empty:
            pass

    def _step(self) -> None:
        started_at = self._step_started_at = time.monotonic()
        try:
            outputs = self._engine.step()
            self._requests.note_started(started_at)
            self._meter.step(outputs, started_at)
            self._requests.deliver(outputs)
        except Exception:  # border: one step; the loop goes on without its requests
            ids = " ".join(f"request_id={request.request_id}" for request in self._requests)
            log.exception("A step failed, and every request with it. %s", ids)
            sentence = "The decoder failed on this step; see its log."
            self._requests.fail_all(Failure(status="INTERNAL", sentence=sentence))
        finally:
            self._step_started_at = None

    def _take(self, message: GatewayMessage) -> None:
        gateway_id, content = message.gateway_id, message.content
        if content.adds:
            self._requests.add(message)
        for request_id in content.aborts:
            self._requests.abort(gateway_id, request_id)
        for missing in content.missing:
            self._sessions.forget(missing)
        for call in content.session_calls:
            self._sessions.answer(call, partial(self._reply, gateway_id))

    def _reply(self, gateway_id: int, answer: SessionAnswer) -> None:
        if answer.freed_bytes:
            self._send_status()  # first, so that the status shows the free memory before the answer
        self._send(gateway_id, FromDecoder(session_answers=[answer]))

    def _send(self, gateway_id: int, message: FromDecoder) -> None:
        assert self._gateways is not None
        self._gateways.send(gateway_id, message)

    def _send_status(self) -> None:
        assert self._gateways is not None
        self._status.measure(self._requests)
        self._gateways.broadcast(FromDecoder(status=self._status.newest))

    def _fill(self, status: ClusterStatus) -> None:
        self._fill_status(status)
        status.kv_fingerprint = self._sessions.fingerprint
