"""ExpertRouter: the Experts protocol over expert hosts, with retry on other copies."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cluster.errors import LinkError, Unavailable
from cluster.links.connect import AUTO, Endpoint, Link
from cluster.placement import ExpertPlacement
from cluster.spec import ModelSpec
from experts import wire
from experts.choices import AskedSlots, Choices, GroupCut
from experts.fallback import Fallback
from experts.load import ExpertLoad
from experts.peers import Peer, Peers
from experts.plan import Asked, Plan, make_plan
from experts.stats import CallObserver, CallStats

WAIT_S = 1.0  # between two signs that a call waits for weights


@dataclass(slots=True)
class _Sent:
    """One frame on its way: what was asked of whom."""

    peer: Peer
    link: Link
    call_id: int
    group_ids: tuple[int, ...]
    sent_s: float


@dataclass(slots=True)
class Handle:
    """An expert call between dispatch and combine, over all its hosts."""

    layer_idx: int
    hidden_states: Tensor  # [num_tokens, hidden], on the CPU
    device: torch.device  # of the result
    choices: Choices
    sent: list[_Sent] = field(default_factory=list)
    orphans: set[int] = field(default_factory=set)  # groups that no host has been asked for
    # By group: the rows of the tokens that have a slot in it.
    rows: dict[int, Tensor] = field(default_factory=dict)
    # By host and group: why it didn't compute this.
    refusals: dict[tuple[str, int], str] = field(default_factory=dict)
    dispatched_s: float = 0.0
    compute_s: float = 0.0  # the slowest host's own time


class ExpertRouter:
    """Dispatches each layer's slots to the hosts that hold their groups, and combines the answers.

    One frame per layer, micro-batch and host. What fails (a closed link, silence past the deadline,
    a refusal) is asked again, for its groups only, of another copy, else of the fallback. As groups
    are the fixed unit of summation, no bit depends on who answered. A host whose link fails is left
    alone for a while; one that refuses or breaks on a call only isn't asked for this call again.

    One thread dispatches and combines; `use` and `stats` may be called from others.
    """

    is_remote = True

    def __init__(
        self,
        spec: ModelSpec,
        placement: ExpertPlacement,
        endpoints: Mapping[str, Endpoint],
        secret: bytes,
        weights_hash: str,
        fallback: Fallback | None = None,
        deadline_s: float = 2.0,
        transports: Sequence[str] = AUTO,
        observer: CallObserver | None = None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        """Connect to every host of the placement that has an endpoint; those that can't be reached
        are tried again in the background. `deadline_s` is for a host's silence while `combine`
        listens to it; a host that computes for longer says so, and is waited for. `on_wait` is
        called every WAIT_S while `combine` waits for the fallback's weights.
        """
        self._spec, self._deadline_s, self._fallback = spec, deadline_s, fallback
        self._peers = Peers(secret, weights_hash, transports, deadline_s)
        self._call_ids = itertools.count(1)
        self._stats = CallStats()
        self.load = ExpertLoad(spec.num_layers, spec.num_experts)
        self._observer = observer
        self._on_wait = on_wait
        self._plan = Plan(None, 0, (), frozenset())
        self._cut = GroupCut(placement.groups)
        self._peers.use(placement, endpoints)

    def use(self, placement: ExpertPlacement, endpoints: Mapping[str, Endpoint]) -> None:
        """Go over to a new placement. Links to hosts that stay where they are stay warm; calls in
        flight to hosts that leave are asked again elsewhere. The cut into groups never changes.
        """
        assert placement.groups == self._peers.placement.groups
        self._peers.use(placement, endpoints)

    def wait_ready(self, deadline_s: float) -> None:
        """Return once every host is linked. Raises Unavailable with the reasons if that takes
        longer than `deadline_s` seconds from now.
        """
        end = time.monotonic() + deadline_s
        while missing := self._peers.problems():
            left_s = end - time.monotonic()
            if left_s <= 0:
                raise Unavailable(f"Expert hosts are missing: {missing}.")
            self._peers.wait_for_change(min(left_s, 0.2))

    def dispatch(
        self, layer_idx: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Handle:
        """Send every host its part.

        Shapes: hidden_states [num_tokens, hidden], topk_ids and topk_weights [num_tokens, k].
        Returns the handle for `combine`; never raises for what a host did.
        """
        handle = Handle(
            layer_idx,
            hidden_states.detach().cpu().contiguous(),
            hidden_states.device,
            Choices(self._cut, topk_ids, topk_weights),
        )
        self._send(handle, self._current_plan())
        self.load.count(layer_idx, handle.choices.experts.reshape(-1).numpy())  # while they compute
        handle.dispatched_s = time.perf_counter()
        return handle

    def combine(self, handle: Handle) -> Tensor:
        """Wait for the answers and add them up: [num_tokens, hidden] in the hidden states' dtype
        and on their device. Raises Unavailable when no copy of a group can answer.
        """
        start = time.perf_counter()
        num_rows = handle.choices.count_rows()
        while handle.sent or handle.orphans:
            while handle.sent:
                sent = handle.sent.pop()
                if not self._collect(handle, sent, num_rows):
                    handle.orphans.update(sent.group_ids)
            if handle.orphans:
                self._retry(handle)
        self._stats.count_combine(
            start - handle.dispatched_s, handle.compute_s, time.perf_counter() - start
        )
        nothing = handle.hidden_states[:0]
        rows = [handle.rows.get(group_id, nothing) for group_id in range(self._cut.num_groups)]
        return handle.choices.add_up(rows).to(handle.device)

    def abandon(self, handle: Handle) -> None:
        """Give a call up instead of combining it: its answers are dropped when they come."""
        for sent in handle.sent:
            sent.peer.forget(sent.call_id)
        handle.sent.clear()

    def stats(self) -> CallStats:
        """Counters since the start; a live object, read it only."""
        return self._stats

    def problems(self) -> dict[str, str]:
        """The hosts that can't be asked right now, each with the reason."""
        return self._peers.problems()

    def link_kind(self, host_id: str) -> str:
        """ "shm", "unix" or "tcp"; empty while there is no link to the host."""
        _, _, alive = self._peers.snapshot()
        link = alive[host_id].link if host_id in alive else None
        return link.kind if link else ""

    def close(self) -> None:
        """Close every link and stop reconnecting."""
        self._peers.close()

    def __enter__(self) -> ExpertRouter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, handle: Handle, plan: Plan) -> None:
        """Ask for what has a slot; groups that nobody can be asked for become orphans."""
        for asked in plan.asked:
            slots = handle.choices.slots_of(asked.is_asked)
            if slots is not None and not self._send_frame(handle, asked, slots, plan.epoch):
                handle.orphans.update(asked.group_ids)
        handle.orphans.update(plan.missing)

    def _send_frame(self, handle: Handle, asked: Asked, slots: AskedSlots, epoch: int) -> bool:
        peer = asked.peer
        link, call_id = peer.link, next(self._call_ids)
        if link is None:
            return False
        hidden_states = slots.rows_of(handle.hidden_states)
        parts = wire.encode_call(call_id, epoch, handle.layer_idx, hidden_states, slots.table)
        peer.outstanding.add(call_id)
        sent_s = time.perf_counter()
        try:
            link.send(parts, self._deadline_s)
        except LinkError as error:
            peer.forget(call_id)
            self._failed(peer, link, str(error))
            return False
        handle.sent.append(_Sent(peer, link, call_id, asked.group_ids, sent_s))
        return True

    def _current_plan(self) -> Plan:
        if self._plan.generation is not self._peers.generation:
            self._plan = make_plan(self._peers, self._cut, range(self._cut.num_groups))
        return self._plan

    def _collect(self, handle: Handle, sent: _Sent, num_rows: list[int]) -> bool:
        """Take in one host's answer; False if it has to be asked again elsewhere. `num_rows`: of
        each group.
        """
        start = time.perf_counter()
        try:
            reply = sent.peer.receive(sent.link, sent.call_id, self._deadline_s)
            if reply.status is not wire.Status.OK:  # the link is good: no reason for a ban
                for group_id in sent.group_ids:
                    handle.refusals[sent.peer.host_id, group_id] = reply.reason
                self._failed(sent.peer, None, reply.reason)
                return False
            counts = [num_rows[group_id] for group_id in sent.group_ids]
            shape = (sum(counts), handle.hidden_states.shape[1])
            if reply.rows.shape != shape or reply.rows.dtype is not handle.hidden_states.dtype:
                raise LinkError(f"{sent.peer.host_id} answered with rows of a wrong shape.")
        except LinkError as error:
            self._failed(sent.peer, sent.link, str(error))
            return False
        handle.rows.update(zip(sent.group_ids, torch.split(reply.rows, counts), strict=True))
        sent.peer.num_bans = 0  # only an answer proves that it is well again
        # When an answer came that was there before it was asked for isn't known: the dense MLP's
        # time mustn't count, so the host's own time stands for it.
        waited_s = time.perf_counter() - start
        latency_s = min(start - sent.sent_s, reply.compute_s) + waited_s
        handle.compute_s = max(handle.compute_s, reply.compute_s)
        self._stats.count_call(latency_s, reply.compute_s)
        if self._observer is not None:
            self._observer.answered(sent.peer.host_id, latency_s)
        return True

    def _failed(self, peer: Peer, link: Link | None, problem: str) -> None:
        """Count a call that has to be asked again elsewhere; ban the host if its link failed."""
        self._stats.num_failures += 1
        if self._observer is not None:
            self._observer.failed(peer.host_id)
        if link is not None:
            self._peers.ban(peer, link, problem)

    def _retry(self, handle: Handle) -> None:
        """Ask for the orphans again: another copy, else the fallback, else Unavailable."""
        group_ids, handle.orphans = handle.orphans, set()
        self._send(handle, make_plan(self._peers, self._cut, group_ids, handle.refusals))
        if handle.sent:
            self._stats.num_retries += 1
        elif handle.orphans:
            self._fall_back(handle)

    def _fall_back(self, handle: Handle) -> None:
        """Compute the orphans here, or wait a while for their weights and leave them orphans.

        Raises Unavailable where that can't be done.
        """
        needed = {
            group_id: slots
            for group_id in sorted(handle.orphans)
            if (slots := handle.choices.slots_of(self._cut.mask([group_id]))) is not None
        }
        handle.orphans.clear()
        if not needed:
            return
        if self._fallback is None or not self._fallback.can_hold(needed):
            refusals = {host_id: reason for (host_id, _), reason in handle.refusals.items()}
            raise Unavailable(
                f"No expert host answers for groups {list(needed)}: "
                f"{self._peers.problems() | refusals}."
            )
        if not self._fallback.load(needed, WAIT_S):
            handle.orphans.update(needed)  # a host may be back before the weights are here
            self._on_wait()
            return
        for group_id, slots in needed.items():
            handle.rows[group_id] = self._fallback.partials(
                group_id, handle.layer_idx, slots.rows_of(handle.hidden_states), slots.unpack()
            )
        self._stats.num_fallbacks += 1
