"""The decoder's step loop: requests in from the gateways, steps, each step's news out again.

Knows neither Ray nor the model: it drives anything that has the surface of EngineCore.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from cluster.errors import BrioletteError, Overloaded
from deployments.decoder.engine import Engine
from deployments.decoder.formats import Arrival, FormatQueue
from deployments.decoder.link import GatewayLinks
from deployments.decoder.loop_status import LoopStatus
from deployments.decoder.meters import EngineMeter
from deployments.decoder.served import Served
from deployments.decoder.session_memory import KeptValues, SessionMemory
from deployments.decoder.tenant_loads import TenantLoads
from deployments.messages import to_output, to_sampling_params
from engine.outputs import RequestOutput
from engine.request import FinishReason, SamplingParams
from protos.briolette.v1.admin_pb2 import ClusterStatus
from protos.briolette.v1.stream_pb2 import (
    Add,
    Failure,
    FromDecoder,
    Output,
    SessionAnswer,
    ToDecoder,
)

BLOCKS_PERIOD_S = 0.001  # between two looks at a block store while nothing else can go on
LONGEST_STEP_S = 120.0  # the largest model's longest prefill on a CPU; past it, the step hangs

log = logging.getLogger(__name__)


class StepLoop:
    """Steps the engine in a thread of its own while there is work; sleeps while there is none.

    `fill_status(status)` writes what the loop doesn't know: the model, the experts, readiness. It
    runs in the step thread, at most once a second, so it must not wait for anything.
    """

    def __init__(
        self,
        engine: Engine,
        meter: EngineMeter,
        fill_status: Callable[[ClusterStatus], None],
        store: KeptValues | None = None,
        on_budget: Callable[[str, int | None], None] = lambda tenant, num_bytes: None,
    ) -> None:
        """`store` is the one that the engine saves its blocks in, if any; `on_budget` is told what
        a tenant may keep there, where it isn't what all may.
        """
        self._engine = engine
        self._fill_status = fill_status
        self._gateways: GatewayLinks | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._formats = FormatQueue(engine.grammars, self._accept)
        self._sessions = SessionMemory(engine, store, self._inbox.put)
        self._meter = meter
        self._tenants = TenantLoads(engine.held_bytes)
        self._on_budget = on_budget
        self._served: dict[str, Served] = {}
        self._queued: list[Served] = []  # those whose first step is still to come
        self._status = LoopStatus(engine, meter, self._tenants, self._fill)
        self._step_began: float | None = None  # the step that runs now
        self._is_running = True
        self._thread = threading.Thread(target=self._run, name="step loop", daemon=True)
        self._measure_status()  # the first gateway may come before the first step

    def start(self, gateways: GatewayLinks) -> None:
        """Run from now on; gateways may send as soon as this returns."""
        self._gateways = gateways
        self._formats.start()
        self._thread.start()

    def close(self) -> None:
        """Stop after the step that runs, and tell what every request has cost until then."""
        self._is_running = False
        self._formats.close()
        self.wake()
        self._thread.join(timeout=10)

    # Called from other threads

    def problem(self) -> str | None:
        """Why the decoder should be replaced; None while the loop is well."""
        if not self._thread.is_alive():
            return "The step loop has ended."
        if not self._formats.is_alive:
            return "The thread that compiles formats has ended."
        began = self._step_began
        if began is not None and time.monotonic() - began > LONGEST_STEP_S:
            return f"A step has taken more than {LONGEST_STEP_S:g} s."
        return None

    def wake(self) -> None:
        """Look at the status soon, even while idle."""
        self._inbox.put(self._status.expire)

    def on_message(self, gateway_id: int, message: ToDecoder) -> None:
        """A gateway sent requests or aborts."""
        arrival = Arrival(gateway_id, message)
        self._formats.drop(message.aborts)
        try:
            if not self._formats.hold(arrival):
                self._accept(arrival)
        except Overloaded as error:
            self._inbox.put(partial(self._refuse_all, arrival, error))

    def on_lost(self, gateway_id: int) -> None:
        """A gateway is gone, and with it everybody who waits for its answers."""
        self._formats.drop_gateway(gateway_id)
        self._inbox.put(lambda: self._drop(gateway_id))

    def _accept(self, arrival: Arrival) -> None:
        self._inbox.put(partial(self._take, arrival))

    def greeting(self) -> FromDecoder:
        """The first message to a new gateway."""
        return FromDecoder(status=self._status.newest)

    # The step thread

    def step_waits(self) -> None:
        """The step under way waits for something that comes: say so, and count its time anew."""
        if self._step_began is not None:
            self._step_began = time.monotonic()
            self._send_status()

    def _run(self) -> None:
        assert self._gateways is not None
        try:
            while self._is_running:
                self._read_inbox()
                if self._engine.has_work:
                    self._step()
                if not self._status.due_in_s:
                    self._send_status()
            sentence = "The decoder is stopping; ask again."
            self._fail_all(Failure(status="UNAVAILABLE", sentence=sentence))
        except Exception:
            log.exception("The step loop ends; the decoder must be replaced.")
        finally:
            self._gateways.close()  # so that no stream waits for ever

    def _read_inbox(self) -> None:
        """Do what was asked for; wait for something to be asked while the engine can do nothing."""
        try:
            if not self._engine.has_work:
                self._inbox.get(timeout=self._status.due_in_s)()
            elif self._engine.waits_for_blocks:
                self._inbox.get(timeout=BLOCKS_PERIOD_S)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            pass

    def _step(self) -> None:
        started = self._step_began = time.monotonic()
        try:
            outputs = self._engine.step()
            self._note_started(started)
            self._meter.step(outputs, started)
            self._deliver(outputs)
        except Exception:
            ends = " ".join(f"request_id={request_id}" for request_id in self._served)
            log.exception("A step failed; every request ends with it. %s", ends)
            sentence = "The decoder failed on this step; its log says why."
            self._fail_all(Failure(status="INTERNAL", sentence=sentence))
        finally:
            self._step_began = None

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """One message for each gateway that has streams in this step."""
        news: defaultdict[int, FromDecoder] = defaultdict(FromDecoder)
        for output in outputs:
            if (served := self._served.get(output.request_id)) is None:
                continue  # aborted: nobody waits for it
            self._tenants.generated(served.request, len(output.new_token_ids))
            message = news[served.gateway_id]
            item = to_output(output, served.queue_s or 0.0, served.saved_prefill_s)
            if output.finish_reason is not None:
                del self._served[output.request_id]
                item.block_keys.extend(self._sessions.keys_of(served.request))
                self._leave_trace(served)
                message.spent.append(served.spent)
            message.outputs.append(item)
        for gateway_id, message in news.items():
            self._send(gateway_id, message)

    def _note_started(self, step_started: float) -> None:
        """Note the time in the queue of those whose first tokens this step has computed."""
        waiting = []
        for served in self._queued:
            request = served.request
            if request.num_computed_tokens:
                served.queue_s = step_started - request.arrived_at
                saved_s = self._engine.prefill_meter.seconds(0, request.num_cached_tokens)
                served.saved_prefill_s = saved_s or 0.0
                self._meter.started(request, served.queue_s, served.saved_prefill_s)
            elif not served.request.is_finished:
                waiting.append(served)
        self._queued = waiting

    def _take(self, arrival: Arrival) -> None:
        gateway_id, message = arrival.gateway_id, arrival.message
        if message.adds:
            self._add_all(arrival)
        for request_id in message.aborts:
            if (served := self._served.pop(request_id, None)) is not None:
                self._engine.abort(request_id)
                self._leave_trace(served)
                self._send(gateway_id, FromDecoder(spent=[served.spent]))
        for missing in message.missing:
            self._sessions.forget(missing)
        for call in message.session_calls:
            self._sessions.answer(call, partial(self._reply, gateway_id))

    def _add_all(self, arrival: Arrival) -> None:
        """The first has the prompt and the format of all, which are read once."""
        first = arrival.message.adds[0]
        prompt_ids = np.array(first.prompt_ids).tolist()  # in half the time of list()
        try:
            sampling = to_sampling_params(first.sampling)
        except Exception as error:  # the border of the engine loop, as below
            self._refuse_all(arrival, error)
            return
        for add in arrival.message.adds:
            if add.request_id not in arrival.dropped:
                seed = add.sampling.seed if add.sampling.HasField("seed") else None
                self._add(arrival, add, prompt_ids, replace(sampling, seed=seed))

    def _add(
        self, arrival: Arrival, add: Add, prompt_ids: list[int], sampling: SamplingParams
    ) -> None:
        deadline_at = arrival.arrived_s + add.timeout_s if add.HasField("timeout_s") else None
        self._on_budget(add.tenant, add.kv_bytes or None)
        try:
            request = self._engine.add(
                request_id=add.request_id,
                prompt_ids=prompt_ids,
                sampling=sampling,
                tenant=add.tenant,
                session=add.session or None,
                weight=add.weight or 1.0,
                priority=add.priority,
                arrived_at=arrival.arrived_s,
                deadline_at=deadline_at,
                chat=add.chat,
            )
        except Exception as error:  # the border: one odd request ends nobody else's
            self._refuse(arrival.gateway_id, add.request_id, _failure(error, add.request_id))
            return
        served = Served(arrival.gateway_id, request, add.same_prompt, add.same_call)
        self._served[add.request_id] = served
        self._queued.append(served)
        self._meter.accepted(request)
        self._tenants.accepted(request)

    def _leave_trace(self, served: Served) -> None:
        """Tell the gateway what a turn of a session has left in the store."""
        if (trace := self._sessions.trace(served.request)) is not None:
            self._send(served.gateway_id, FromDecoder(session_traces=[trace]))

    def _reply(self, gateway_id: int, answer: SessionAnswer) -> None:
        if answer.freed_bytes:
            self._send_status()  # first, so that whoever has the answer sees the memory free
        self._send(gateway_id, FromDecoder(session_answers=[answer]))

    def _refuse_all(self, arrival: Arrival, error: Exception) -> None:
        for add in arrival.message.adds:
            self._refuse(arrival.gateway_id, add.request_id, _failure(error, add.request_id))

    def _refuse(self, gateway_id: int, request_id: str, failure: Failure) -> None:
        output = Output(request_id=request_id, failure=failure)
        self._send(gateway_id, FromDecoder(outputs=[output]))

    def _drop(self, gateway_id: int) -> None:
        lost = [rid for rid, served in self._served.items() if served.gateway_id == gateway_id]
        for request_id in lost:
            del self._served[request_id]
            self._engine.abort(request_id)

    def _fail_all(self, failure: Failure) -> None:
        for request_id, served in list(self._served.items()):
            self._engine.abort(request_id, FinishReason.ERROR)
            self._leave_trace(served)
            self._send(served.gateway_id, FromDecoder(spent=[served.spent]))
            self._refuse(served.gateway_id, request_id, failure)
        self._served.clear()

    def _send(self, gateway_id: int, message: FromDecoder) -> None:
        assert self._gateways is not None
        self._gateways.send(gateway_id, message)

    def _send_status(self) -> None:
        assert self._gateways is not None
        self._measure_status()
        self._gateways.broadcast(FromDecoder(status=self._status.newest))

    def _measure_status(self) -> None:
        self._status.measure(served.request for served in self._served.values())

    def _fill(self, status: ClusterStatus) -> None:
        self._fill_status(status)
        status.kv_fingerprint = self._sessions.fingerprint


def _failure(error: Exception, request_id: str) -> Failure:
    if isinstance(error, BrioletteError):
        return Failure(status=error.status, sentence=str(error), kind=error.kind)
    log.error("A request can't be added. request_id=%s", request_id, exc_info=error)
    sentence = "The decoder failed on this request; its log says why."
    return Failure(status="INTERNAL", sentence=sentence)
