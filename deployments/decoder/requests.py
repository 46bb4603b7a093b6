"""The requests in the engine: added for a gateway, answered after each step, ended with a cost."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from cluster.errors import BrioletteError
from deployments.decoder.formats import GatewayMessage
from deployments.decoder.meters import EngineMeter
from deployments.decoder.session_memory import SessionMemory
from deployments.decoder.status import TenantLoads
from deployments.messages import to_output, to_sampling_params
from engine.core import EngineCore
from engine.outputs import RequestOutput
from engine.request import FinishReason, Request, SamplingParams
from protos.briolette.v1.inference_pb2 import Usage
from protos.briolette.v1.stream_pb2 import Add, Failure, FromDecoder, Output, Spent

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ActiveRequest:
    """A request in the engine, with the gateway that waits for its answer."""

    gateway_id: int
    request: Request
    same_prompt: bool  # another answer to the same call is charged for the prompt
    same_call: bool  # another answer to the same call is counted as the request
    queue_s: float | None = None  # until its first step
    saved_prefill_s: float = 0.0  # by cached tokens

    @property
    def spent(self) -> Spent:
        """The request's cost so far, without what another answer to the same call is charged."""
        request = self.request
        usage = Usage() if self.same_prompt else self._prompt_usage
        usage.output_tokens = len(request.output_ids)
        return Spent(tenant=request.tenant, usage=usage, requests=0 if self.same_call else 1)

    @property
    def _prompt_usage(self) -> Usage:
        request = self.request
        num_reached = request.num_computed_tokens + len(request.output_ids)
        return Usage(
            prompt_tokens=min(len(request.prompt_ids), num_reached),
            cached_tokens=request.num_cached_tokens,
            fetched_tokens=request.num_fetched_tokens,
            saved_prefill_s=self.saved_prefill_s,
        )


class GatewayRequests:
    """Adds requests to the engine and sends their answers; runs in the step thread only."""

    def __init__(
        self,
        *,
        engine: EngineCore,
        meter: EngineMeter,
        tenants: TenantLoads,
        sessions: SessionMemory,
        send: Callable[[int, FromDecoder], None],
        on_budget: Callable[[str, int | None], None],
    ) -> None:
        """Start without requests.

        Args:
            engine: Computes them.
            meter: Counts and times them.
            tenants: Counts their tokens by tenant.
            sessions: Knows which values of a session are in the store.
            send: Sends a message to a gateway, by its id; must not wait.
            on_budget: Called with (tenant, bytes that it may keep in the store, or None).
        """
        self._engine, self._meter = engine, meter
        self._tenants, self._sessions = tenants, sessions
        self._send, self._on_budget = send, on_budget
        self._active: dict[str, ActiveRequest] = {}  # by request id
        self._unstarted: list[ActiveRequest] = []  # their first step is still to come

    def __len__(self) -> int:
        return len(self._active)

    def __iter__(self) -> Iterator[Request]:
        return (active.request for active in self._active.values())

    def add(self, message: GatewayMessage) -> None:
        """Add the answers to one call; all have the prompt and the format of the first one."""
        adds = message.content.adds
        prompt_ids = np.array(adds[0].prompt_ids).tolist()  # in half the time of list()
        try:
            sampling = to_sampling_params(adds[0].sampling)
        except Exception as error:  # border: one request, as in `_add`
            self.refuse_all(message, error)
            return
        for add in adds:
            if add.request_id not in message.dropped:
                seed = add.sampling.seed if add.sampling.HasField("seed") else None
                self._add(message, add, prompt_ids, replace(sampling, seed=seed))

    def abort(self, gateway_id: int, request_id: str) -> None:
        """End a request that its gateway doesn't wait for any more; unknown ids are ignored."""
        if (active := self._active.pop(request_id, None)) is not None:
            self._engine.abort(request_id)
            self._send_session_trace(active)
            self._send(gateway_id, FromDecoder(spent=[active.spent]))

    def drop_gateway(self, gateway_id: int) -> None:
        """End every request of a gateway that is gone."""
        lost = [rid for rid, active in self._active.items() if active.gateway_id == gateway_id]
        for request_id in lost:
            del self._active[request_id]
            self._engine.abort(request_id)

    def note_started(self, step_started_at: float) -> None:
        """Note the time in the queue of requests whose first tokens this step has computed."""
        unstarted = []
        for active in self._unstarted:
            request = active.request
            if request.num_computed_tokens:
                active.queue_s = step_started_at - request.arrived_at
                saved_s = self._engine.prefill_meter.seconds(0, request.num_cached_tokens)
                active.saved_prefill_s = saved_s or 0.0
                self._meter.started(request, active.queue_s, active.saved_prefill_s)
            elif not request.is_finished:
                unstarted.append(active)
        self._unstarted = unstarted

    def deliver(self, outputs: list[RequestOutput]) -> None:
        """Send each gateway one message with the outputs of a step for all its requests."""
        messages: defaultdict[int, FromDecoder] = defaultdict(FromDecoder)
        for output in outputs:
            if (active := self._active.get(output.request_id)) is None:
                continue  # aborted
            self._tenants.generated(active.request, len(output.new_token_ids))
            message = messages[active.gateway_id]
            item = to_output(output, active.queue_s or 0.0, active.saved_prefill_s)
            if output.finish_reason is not None:
                del self._active[output.request_id]
                item.block_keys.extend(self._sessions.keys_of(active.request))
                self._send_session_trace(active)
                message.spent.append(active.spent)
            message.outputs.append(item)
        for gateway_id, message in messages.items():
            self._send(gateway_id, message)

    def fail_all(self, failure: Failure) -> None:
        """End every request with a failure, and tell what it has cost."""
        for request_id, active in list(self._active.items()):
            self._engine.abort(request_id, FinishReason.ERROR)
            self._send_session_trace(active)
            self._send(active.gateway_id, FromDecoder(spent=[active.spent]))
            self._refuse(active.gateway_id, request_id, failure)
        self._active.clear()

    def refuse_all(self, message: GatewayMessage, error: Exception) -> None:
        """Answer every request of a message with an error."""
        for add in message.content.adds:
            self._refuse(message.gateway_id, add.request_id, to_failure(error, add.request_id))

    def _add(
        self, message: GatewayMessage, add: Add, prompt_ids: list[int], sampling: SamplingParams
    ) -> None:
        self._on_budget(add.tenant, add.kv_bytes or None)
        has_deadline = add.HasField("timeout_s")
        try:
            request = self._engine.add(
                request_id=add.request_id,
                prompt_ids=prompt_ids,
                sampling=sampling,
                tenant=add.tenant,
                session=add.session or None,
                weight=add.weight or 1.0,
                priority=add.priority,
                arrived_at=message.arrived_at,
                deadline_at=message.arrived_at + add.timeout_s if has_deadline else None,
                chat=add.chat,
            )
        except Exception as error:  # border: one request; the others go on
            failure = to_failure(error, add.request_id)
            self._refuse(message.gateway_id, add.request_id, failure)
            return
        active = ActiveRequest(
            gateway_id=message.gateway_id,
            request=request,
            same_prompt=add.same_prompt,
            same_call=add.same_call,
        )
        self._active[add.request_id] = active
        self._unstarted.append(active)
        self._meter.accepted(request)
        self._tenants.accepted(request)

    def _refuse(self, gateway_id: int, request_id: str, failure: Failure) -> None:
        output = Output(request_id=request_id, failure=failure)
        self._send(gateway_id, FromDecoder(outputs=[output]))

    def _send_session_trace(self, active: ActiveRequest) -> None:
        """Tell the gateway which values a turn of a session has left in the store."""
        if (trace := self._sessions.trace(active.request)) is not None:
            self._send(active.gateway_id, FromDecoder(session_traces=[trace]))


def to_failure(error: Exception, request_id: str) -> Failure:
    """Return an error as a gateway is told it; logs one that is not ours."""
    if isinstance(error, BrioletteError):
        return Failure(status=error.status, sentence=str(error), kind=error.kind)
    log.error("A request could not be added. request_id=%s", request_id, exc_info=error)
    sentence = "The decoder failed on this request; see its log."
    return Failure(status="INTERNAL", sentence=sentence)
