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
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from cluster.errors import BrioletteError
from deployments.decoding.link import GatewayLinks
from deployments.decoding.session_memory import KeptValues, SessionEngine, SessionMemory
from deployments.decoding.tenant_loads import TenantLoads
from deployments.messages import to_load, to_output, to_sampling_params
from deployments.meters import EngineMeter
from engine.outputs import EngineStats, RequestOutput
from engine.prefill_meter import PrefillMeter
from engine.request import FinishReason, Request, SamplingParams
from protos.briolette.v1.admin_pb2 import ClusterStatus, EngineLoad
from protos.briolette.v1.inference_pb2 import Usage
from protos.briolette.v1.stream_pb2 import (
    Add,
    Failure,
    FromDecoder,
    Output,
    SessionAnswer,
    Spent,
    ToDecoder,
)

STATUS_PERIOD_S = 1.0
BLOCKS_PERIOD_S = 0.001  # between two looks at a block store while nothing else can go on
LONGEST_STEP_S = 120.0  # the largest model's longest prefill on a CPU; past it, the step hangs

log = logging.getLogger(__name__)


class Engine(SessionEngine, Protocol):
    """What the loop needs of engine.core.EngineCore."""

    @property
    def has_work(self) -> bool: ...
    @property
    def prefill_meter(self) -> PrefillMeter: ...
    @property
    def waits_for_blocks(self) -> bool: ...
    def add(
        self,
        *,
        request_id: str,
        prompt_ids: list[int],
        sampling: SamplingParams,
        seed: int | None = None,
        tenant: str = "default",
        session: str | None = None,
        weight: float = 1.0,
        priority: int = 0,
        deadline_s: float | None = None,
        chat: bool = False,
    ) -> Request: ...
    def compile(self, sampling: SamplingParams) -> None: ...
    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> object: ...
    def step(self) -> list[RequestOutput]: ...
    def stats(self) -> EngineStats: ...
    def held_bytes(self, request: Request) -> int: ...


@dataclass(slots=True)
class _Served:
    """A request that is in the engine, and where its answer goes."""

    gateway_id: int
    request: Request
    queue_s: float | None = None  # until its first step
    saved_prefill_s: float = 0.0  # by what it found cached

    @property
    def spent(self) -> Spent:
        """What it has cost."""
        request = self.request
        num_reached = request.num_computed_tokens + len(request.output_ids)
        return Spent(
            tenant=request.tenant,
            usage=Usage(
                prompt_tokens=min(len(request.prompt_ids), num_reached),
                output_tokens=len(request.output_ids),
                cached_tokens=request.num_cached_tokens,
                fetched_tokens=request.num_fetched_tokens,
                saved_prefill_s=self.saved_prefill_s,
            ),
        )


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
        self._sessions = SessionMemory(engine, store, self._inbox.put)
        self._meter = meter
        self._tenants = TenantLoads(engine.held_bytes)
        self._on_budget = on_budget
        self._served: dict[str, _Served] = {}
        self._queued: list[_Served] = []  # those whose first step is still to come
        self._status = ClusterStatus()
        self._status_at = 0.0
        self._step_began: float | None = None  # the step that runs now
        self._is_running = True
        self._thread = threading.Thread(target=self._run, name="step loop", daemon=True)
        self._refresh_status()  # the first gateway may come before the first step

    def start(self, gateways: GatewayLinks) -> None:
        """Run from now on; gateways may send as soon as this returns."""
        self._gateways = gateways
        self._thread.start()

    def close(self) -> None:
        """Stop after the step that runs."""
        self._is_running = False
        self.wake()
        self._thread.join(timeout=10)

    # Called from other threads

    def problem(self) -> str | None:
        """Why the decoder should be replaced; None while the loop is well."""
        if not self._thread.is_alive():
            return "The step loop has ended."
        began = self._step_began
        if began is not None and time.monotonic() - began > LONGEST_STEP_S:
            return f"A step has taken more than {LONGEST_STEP_S:g} s."
        return None

    def wake(self) -> None:
        """Look at the status soon, even while idle."""
        self._inbox.put(self._expire_status)

    def on_message(self, gateway_id: int, message: ToDecoder) -> None:
        """A gateway sent requests or aborts."""
        for add in message.adds:
            self._compile(add)
        self._inbox.put(lambda: self._take(gateway_id, message))

    def _compile(self, add: Add) -> None:
        """A format, here already: it takes as long as several steps."""
        if add.sampling.WhichOneof("format") is not None:
            with suppress(Exception):  # it comes again when the request is added, and is told
                self._engine.compile(to_sampling_params(add.sampling))

    def on_lost(self, gateway_id: int) -> None:
        """A gateway is gone, and with it everybody who waits for its answers."""
        self._inbox.put(lambda: self._drop(gateway_id))

    def greeting(self) -> FromDecoder:
        """The first message to a new gateway."""
        return FromDecoder(status=self._status)

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
                if time.monotonic() - self._status_at >= STATUS_PERIOD_S:
                    self._send_status()
        except Exception:
            log.exception("The step loop ends; the decoder must be replaced.")
        finally:
            self._gateways.close()  # so that no stream waits for ever

    def _read_inbox(self) -> None:
        """Do what was asked for; wait for something to be asked while the engine can do nothing."""
        try:
            if not self._engine.has_work:
                self._inbox.get(timeout=STATUS_PERIOD_S)()
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
            log.exception("A step failed; every request ends with it.")
            self._fail_all("The decoder failed on this step; its log says why.")
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
                served.queue_s = step_started - request.arrival_s
                saved_s = self._engine.prefill_meter.seconds(0, request.num_cached_tokens)
                served.saved_prefill_s = saved_s or 0.0
                self._meter.started(request, served.queue_s, served.saved_prefill_s)
            elif not served.request.is_finished:
                waiting.append(served)
        self._queued = waiting

    def _take(self, gateway_id: int, message: ToDecoder) -> None:
        prompt_ids: list[int] = []
        for add in message.adds:
            if not add.same_prompt:
                prompt_ids = np.array(add.prompt_ids).tolist()  # in half the time of list()
            self._add(gateway_id, add, prompt_ids)
        for request_id in message.aborts:
            if (served := self._served.pop(request_id, None)) is not None:
                self._engine.abort(request_id)
                self._leave_trace(served)
                self._send(gateway_id, FromDecoder(spent=[served.spent]))
        for missing in message.missing:
            self._sessions.forget(missing)
        for call in message.session_calls:
            self._sessions.answer(call, partial(self._reply, gateway_id))

    def _add(self, gateway_id: int, add: Add, prompt_ids: list[int]) -> None:
        now = time.monotonic()
        self._on_budget(add.tenant, add.kv_bytes or None)
        try:
            request = self._engine.add(
                request_id=add.request_id,
                prompt_ids=prompt_ids,
                sampling=to_sampling_params(add.sampling),
                tenant=add.tenant,
                session=add.session or None,
                weight=add.weight or 1.0,
                priority=add.priority,
                deadline_s=now + add.timeout_s if add.HasField("timeout_s") else None,
                chat=add.chat,
            )
        except BrioletteError as error:
            self._refuse(gateway_id, add.request_id, error.status, str(error), error.kind)
            return
        except Exception:  # the border of the engine loop: one odd request ends nobody else's
            log.exception("Adding the request %s failed.", add.request_id)
            sentence = "The decoder failed on this request; its log says why."
            self._refuse(gateway_id, add.request_id, "INTERNAL", sentence)
            return
        served = _Served(gateway_id, request)
        self._served[add.request_id] = served
        self._queued.append(served)
        self._meter.accepted(request)
        self._tenants.accepted(request)

    def _leave_trace(self, served: _Served) -> None:
        """Tell the gateway what a turn of a session has left in the store."""
        if (trace := self._sessions.trace(served.request)) is not None:
            self._send(served.gateway_id, FromDecoder(session_traces=[trace]))

    def _reply(self, gateway_id: int, answer: SessionAnswer) -> None:
        if answer.freed_bytes:
            self._send_status()  # first, so that whoever has the answer sees the memory free
        self._send(gateway_id, FromDecoder(session_answers=[answer]))

    def _refuse(
        self, gateway_id: int, request_id: str, status: str, sentence: str, kind: str = ""
    ) -> None:
        failure = Failure(status=status, sentence=sentence, kind=kind)
        self._send(
            gateway_id, FromDecoder(outputs=[Output(request_id=request_id, failure=failure)])
        )

    def _drop(self, gateway_id: int) -> None:
        lost = [rid for rid, served in self._served.items() if served.gateway_id == gateway_id]
        for request_id in lost:
            del self._served[request_id]
            self._engine.abort(request_id)

    def _fail_all(self, sentence: str) -> None:
        for request_id, served in list(self._served.items()):
            self._engine.abort(request_id, FinishReason.ERROR)
            self._leave_trace(served)
            self._send(served.gateway_id, FromDecoder(spent=[served.spent]))
            self._refuse(served.gateway_id, request_id, "INTERNAL", sentence)
        self._served.clear()

    def _send(self, gateway_id: int, message: FromDecoder) -> None:
        assert self._gateways is not None
        self._gateways.send(gateway_id, message)

    def _expire_status(self) -> None:
        self._status_at = 0.0

    def _send_status(self) -> None:
        assert self._gateways is not None
        self._refresh_status()
        self._gateways.broadcast(FromDecoder(status=self._status))

    def _refresh_status(self) -> None:
        status = ClusterStatus(load=self._load())
        self._meter.load(status.load)
        status.measured_at = time.time()
        status.tenants.extend(self._tenants.of(served.request for served in self._served.values()))
        self._meter.held(status.tenants)
        self._fill_status(status)
        status.kv_fingerprint = self._sessions.fingerprint
        self._status = status
        self._status_at = time.monotonic()

    def _load(self) -> EngineLoad:
        """The engine's numbers; the rate is kept from the last second in which there was one."""
        stats = self._engine.stats()
        self._meter.shares(stats.fair_share)
        load = to_load(stats)
        before = self._status.load
        new_tokens = load.decode_tokens - before.decode_tokens
        if new_tokens > 0 and self._status_at > 0:
            load.decode_tokens_per_s = new_tokens / (time.monotonic() - self._status_at)
        else:
            load.decode_tokens_per_s = before.decode_tokens_per_s
        return load
