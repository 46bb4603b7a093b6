"""ExpertHost: owns groups of experts in every layer and answers expert calls over links."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cluster.checkpoint import Checkpoint
from cluster.errors import LinkError
from cluster.links.connect import AUTO, Endpoint, Link, Listener
from cluster.placement import ExpertPlacement
from cluster.spec import ModelSpec
from experts import wire
from experts.heartbeat import Heartbeat
from experts.stats import ExpertLoad
from experts.weights import OwnedExperts, load_experts

REPLY_TIMEOUT_S = 10.0  # for a router to take an answer
MAX_HANDSHAKES = 32  # connections that shake hands at one time
MAX_BROKEN_CALLS = 5  # one after the other; then the host itself is what is broken


@dataclass(frozen=True, slots=True)
class HostStats:
    """What a host has done since it started."""

    host_id: str
    epoch: int
    group_ids: tuple[int, ...]
    num_bytes: int  # of weights
    num_links: int
    num_calls: int
    num_refusals: int
    compute_s: float
    expert_load: list[list[int]]  # tokens per layer and logical expert


@dataclass(frozen=True, slots=True)
class _Serving:
    """What a host serves at one time: swapped as a whole."""

    epoch: int
    owned: OwnedExperts


class ExpertHost:
    """The experts of the groups that a placement gives to `host_id`, behind a listener.

    A thread per link reads calls and answers them; one call computes at a time. Use it as a context
    manager, or `start` and `close` it.
    """

    def __init__(
        self,
        host_id: str,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        placement: ExpertPlacement,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        secret: bytes,
        batch_invariant: bool = False,
        listen_host: str = "127.0.0.1",
        listen_port: int = 0,
        transports: Sequence[str] = AUTO,
        num_threads: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Read the owned experts.

        Args:
            host_id: this host's name in the placement.
            spec: of the model.
            checkpoint: to read from.
            placement: which hosts hold which groups.
            dtype: of the weights and the hidden states.
            device: that computes.
            secret: of the cluster, for the handshake.
            batch_invariant: whether a row's bits mustn't depend on the batch.
            listen_host: the address to listen on.
            listen_port: the port to listen on; 0 for any.
            transports: kinds of links to offer.
            num_threads: for computing, in the whole process; None leaves torch's number.
            on_progress: called with (layers read, layers in all).

        Raises:
            CheckpointError, NotEnoughMemory, ConfigError: as `load_experts` does.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.host_id = host_id
        self._spec, self._checkpoint = spec, checkpoint
        self._dtype, self._device, self._secret = dtype, device, secret
        self._batch_invariant = batch_invariant
        self._listen_host, self._listen_port = listen_host, listen_port
        self._transports = transports
        self._listener: Listener | None = None
        self._accepting: threading.Thread | None = None
        self._handshakes = threading.Semaphore(MAX_HANDSHAKES)
        self._links: set[Link] = set()
        self._threads: set[threading.Thread] = set()
        self._compute_lock = threading.Lock()
        self._is_closing = False
        self._num_calls = self._num_refusals = 0
        self._num_broken_calls = 0  # since the last one that was computed
        self._compute_s = 0.0
        self.load = ExpertLoad(spec.num_layers, spec.num_experts)
        self._serving = self._load_placement(placement, None, on_progress)

    def start(self) -> Endpoint:
        """Listen and serve; returns where routers reach this host. Raises PortTaken."""
        assert self._listener is None
        self._is_closing = False
        self._listener = Listener(
            self._secret, self._verify, self._listen_host, self._listen_port, self._transports
        )
        self._accepting = threading.Thread(
            target=self._accept, args=(self._listener,), name="expert-accept", daemon=True
        )
        self._accepting.start()
        return self._listener.endpoint

    def use(self, placement: ExpertPlacement) -> None:
        """Serve a new placement: load its groups, then swap.

        Links stay; calls under any other epoch are refused from then on. Raises CheckpointError,
        and then nothing has changed.
        """
        self._serving = self._load_placement(placement, self._serving)

    def stats(self) -> HostStats:
        """Return the counters since the start; cheap."""
        serving = self._serving
        return HostStats(
            host_id=self.host_id,
            epoch=serving.epoch,
            group_ids=serving.owned.group_ids,
            num_bytes=serving.owned.num_bytes,
            num_links=len(self._links),
            num_calls=self._num_calls,
            num_refusals=self._num_refusals,
            compute_s=self._compute_s,
            expert_load=self.load.total.tolist(),
        )

    def problem(self) -> str | None:
        """Return why a started host should be replaced; None while it is well."""
        if self._accepting is not None and not self._accepting.is_alive():
            return f"{self.host_id} accepts no links any more."
        if self._num_broken_calls >= MAX_BROKEN_CALLS:
            return f"The last {self._num_broken_calls} calls broke in {self.host_id}."
        return None

    def close(self) -> None:
        """Close every link and stop; calls in flight see a closed link."""
        if self._listener is None:
            return
        self._is_closing = True
        self._listener.close()
        assert self._accepting is not None
        self._accepting.join()
        for link in list(self._links):
            link.close()
        for thread in list(self._threads):
            thread.join(REPLY_TIMEOUT_S)
        self._listener = None

    def __enter__(self) -> ExpertHost:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def endpoint(self) -> Endpoint:
        """Where routers reach this host, once started."""
        assert self._listener is not None
        return self._listener.endpoint

    def answer(self, frame: memoryview) -> list[memoryview]:
        """Compute one call's frame into the parts of its reply; never raises."""
        call_id, serving = wire.peek_call_id(frame), self._serving
        try:
            call = wire.decode_call(frame, self._spec.num_experts, self._spec.hidden_size)
            if call.epoch != serving.epoch:
                reason = f"{self.host_id} serves epoch {serving.epoch}, not {call.epoch}."
                return self._refuse(call_id, wire.ReplyStatus.STALE_EPOCH, reason)
            return self._compute(call, serving)
        except LinkError as error:
            return self._refuse(call_id, wire.ReplyStatus.REFUSED, str(error))
        except Exception as error:  # border: the expert call; the router asks another copy
            self._num_broken_calls += 1
            reason = f"{self.host_id} broke: {type(error).__name__}: {error}"
            return self._refuse(call_id, wire.ReplyStatus.FAILED, reason)

    def reply(self, link: Link, frame: memoryview, heartbeat: Heartbeat) -> None:
        """Answer one call's frame over its link."""
        heartbeat.call_id = wire.peek_call_id(frame)
        parts = self.answer(frame)
        heartbeat.call_id = None
        link.send(parts, REPLY_TIMEOUT_S)

    def _compute(self, call: wire.ExpertCall, serving: _Serving) -> list[memoryview]:
        start = time.perf_counter()
        owned = serving.owned
        if call.layer_idx >= len(owned.layers):
            raise LinkError(f"{self.host_id} has no layer {call.layer_idx}.")
        hidden_states = call.hidden_states.to(self._device)
        with torch.inference_mode(), self._compute_lock:
            rows = owned.rows(call.layer_idx, hidden_states, call.slot_table)
            if rows is None:
                raise LinkError(f"{self.host_id} doesn't own what call {call.call_id} asks for.")
            rows = rows.cpu()
            self.load.count(call.layer_idx, call.slot_table[1].numpy())
            self._num_calls += 1
            self._num_broken_calls = 0
            elapsed_s = time.perf_counter() - start
            self._compute_s += elapsed_s
        return wire.encode_rows(call.call_id, call.epoch, rows, elapsed_s)

    def _refuse(self, call_id: int, status: wire.ReplyStatus, reason: str) -> list[memoryview]:
        self._num_refusals += 1
        return wire.encode_failure(call_id, self._serving.epoch, status, reason)

    def _verify(self, data: bytes) -> bytes:
        hello, epoch = wire.RouterHello.decode(data), self._serving.epoch
        if hello.host_id != self.host_id:
            raise LinkError(f"This is expert host {self.host_id}, not {hello.host_id}.")
        if hello.weights_hash != self._checkpoint.fingerprint:
            raise LinkError(f"{self.host_id} serves other weights than this decoder's.")
        if hello.epoch != epoch:
            raise LinkError(f"{self.host_id} serves epoch {epoch}, not {hello.epoch}.")
        return b""

    def _accept(self, listener: Listener) -> None:
        with contextlib.suppress(LinkError):  # closed
            while True:
                sock = listener.accept_socket()
                if not self._handshakes.acquire(blocking=False):
                    sock.close()  # a flood of connections; routers try again
                    continue
                thread = threading.Thread(
                    target=self._serve, args=(listener, sock), name="expert-link", daemon=True
                )
                self._threads.add(thread)
                thread.start()

    def _serve(self, listener: Listener, sock: socket.socket) -> None:
        try:
            link = self._welcome(listener, sock)
            hello = wire.RouterHello.decode(link.hello)
            with Heartbeat(link, hello.heartbeat_s) as heartbeat, link:
                self._links.add(link)
                try:
                    while not self._is_closing:
                        self.reply(link, link.recv(None), heartbeat)
                finally:
                    self._links.discard(link)
        except LinkError:
            pass  # the router went away, or was told why it is refused
        finally:
            self._threads.discard(threading.current_thread())

    def _welcome(self, listener: Listener, sock: socket.socket) -> Link:
        try:
            return listener.welcome(sock)
        finally:
            self._handshakes.release()

    def _load_placement(
        self,
        placement: ExpertPlacement,
        before: _Serving | None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> _Serving:
        group_ids = placement.groups_of(self.host_id)
        if before is not None and before.owned.group_ids == group_ids:
            return _Serving(placement.epoch, before.owned)
        owned = load_experts(
            self._spec,
            self._checkpoint,
            placement.groups,
            group_ids,
            dtype=self._dtype,
            device=self._device,
            batch_invariant=self._batch_invariant,
            on_progress=on_progress,
        )
        return _Serving(placement.epoch, owned)
