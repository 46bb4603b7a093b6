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
from experts.dispatch_plan import DispatchPlan, HostShare, plan_dispatch
from experts.fallback import Fallback
from experts.host_links import ExpertHostLink, ExpertHostLinks
from experts.routed_tokens import ExpertGroupTable, RoutedTokens, SelectedSlots
from experts.stats import CallObserver, CallStats, ExpertLoad

WAIT_S = 1.0  # between two calls of `on_wait`


@dataclass(slots=True)
class _SentCall:
    """One frame that was sent to a host and isn't answered yet."""

    host: ExpertHostLink
    link: Link
    call_id: int
    group_ids: tuple[int, ...]
    sent_at: float


@dataclass(slots=True)
class DispatchHandle:
    """A layer's experts between dispatch and combine, over all hosts."""

    layer_idx: int
    hidden_states: Tensor  # [num_tokens, hidden], on the CPU
    device: torch.device  # of the result
    routed: RoutedTokens
    sent: list[_SentCall] = field(default_factory=list)
    unassigned: set[int] = field(default_factory=set)  # groups that no host is asked for
    group_rows: dict[int, Tensor] = field(default_factory=dict)  # the answers, by group
    # By host and group: why it didn't compute this.
    refusals: dict[tuple[str, int], str] = field(default_factory=dict)
    dispatched_at: float = 0.0
    compute_s: float = 0.0  # the slowest host's own time


class ExpertRouter:
    """Dispatches each layer's slots to the hosts that hold their groups, and combines the answers.

    One frame per layer, micro-batch and host. What fails (a closed link, silence past the timeout,
    a refusal) is asked again, for its groups only, of another copy, else of the fallback. As groups
    are the fixed unit of summation, no bit depends on who answered. A host whose link fails is
    banned for a while; one that refuses or breaks on a call only isn't asked for this call again.

    One thread dispatches and combines; `use` and `stats` may be called from others.
    """

    is_remote = True

    def __init__(
        self,
        spec: ModelSpec,
        placement: ExpertPlacement,
        endpoints: Mapping[str, Endpoint],
        *,
        secret: bytes,
        weights_hash: str,
        fallback: Fallback | None = None,
        timeout_s: float = 2.0,
        transports: Sequence[str] = AUTO,
        observer: CallObserver | None = None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        """Connect to every host that has an endpoint; those that can't be reached are tried again
        in the background.

        Args:
            spec: of the model.
            placement: which hosts hold which groups.
            endpoints: of the hosts that are known so far.
            secret: of the cluster, for the handshake.
            weights_hash: the fingerprint of the decoder's checkpoint, which hosts must share.
            fallback: computes groups that no host can be asked for; None to raise Unavailable.
            timeout_s: the longest silence of a host while `combine` waits for it; one that computes
                for longer says so, and is waited for.
            transports: kinds of links to try, in order.
            observer: is told of every call.
            on_wait: called every WAIT_S while `combine` waits for the fallback's weights.
        """
        self._timeout_s, self._fallback = timeout_s, fallback
        self._links = ExpertHostLinks(secret, weights_hash, transports, timeout_s)
        self._call_ids = itertools.count(1)
        self._stats = CallStats()
        self.load = ExpertLoad(spec.num_layers, spec.num_experts)
        self._observer, self._on_wait = observer, on_wait
        self._plan = DispatchPlan.empty()
        self._table = ExpertGroupTable(placement.groups)
        self._links.use(placement, endpoints)

    def use(self, placement: ExpertPlacement, endpoints: Mapping[str, Endpoint]) -> None:
        """Go over to a new placement of the same groups.

        Links to hosts that stay where they are stay warm; calls in flight to hosts that leave are
        asked again elsewhere.
        """
        assert placement.groups == self._links.placement.groups
        self._links.use(placement, endpoints)

    def wait_ready(self, timeout_s: float) -> None:
        """Return once every host is linked.

        Raises:
            Unavailable: some aren't after `timeout_s`; the message has the reasons.
        """
        give_up_at = time.monotonic() + timeout_s
        while missing := self._links.problems():
            left_s = give_up_at - time.monotonic()
            if left_s <= 0:
                raise Unavailable(f"Expert hosts are missing: {missing}.")
            self._links.wait_for_change(min(left_s, 0.2))

    def dispatch(
        self, layer_idx: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> DispatchHandle:
        """Send every host its share; never raises for what a host did.

        Args:
            layer_idx: of the experts.
            hidden_states: [num_tokens, hidden].
            topk_ids: [num_tokens, k] int64.
            topk_weights: [num_tokens, k].

        Returns:
            The handle for `combine` or `abandon`.
        """
        handle = DispatchHandle(
            layer_idx,
            hidden_states.detach().cpu().contiguous(),
            hidden_states.device,
            RoutedTokens(self._table, topk_ids, topk_weights),
        )
        self._send(handle, self._current_plan())
        self.load.count(layer_idx, handle.routed.topk_ids.flatten().numpy())  # while hosts compute
        handle.dispatched_at = time.perf_counter()
        return handle

    def combine(self, handle: DispatchHandle) -> Tensor:
        """Wait for the answers and add them up.

        Returns:
            [num_tokens, hidden] in the dtype and on the device of the hidden states.

        Raises:
            Unavailable: no copy of a group can answer.
        """
        start = time.perf_counter()
        num_rows = handle.routed.count_rows()
        while handle.sent or handle.unassigned:
            while handle.sent:
                call = handle.sent.pop()
                if not self._collect(handle, call, num_rows):
                    handle.unassigned.update(call.group_ids)
            if handle.unassigned:
                self._retry(handle)
        self._stats.count_combine(
            between_s=start - handle.dispatched_at,
            compute_s=handle.compute_s,
            waited_s=time.perf_counter() - start,
        )
        no_rows = handle.hidden_states[:0]
        group_ids = range(self._table.num_groups)
        group_rows = [handle.group_rows.get(group_id, no_rows) for group_id in group_ids]
        return handle.routed.sum_groups(group_rows).to(handle.device)

    def abandon(self, handle: DispatchHandle) -> None:
        """Give a call up instead of combining it: its answers are dropped when they come."""
        for call in handle.sent:
            call.host.forget(call.call_id)
        handle.sent.clear()

    def stats(self) -> CallStats:
        """Return the counters since the start: a live object, to be read only."""
        return self._stats

    def problems(self) -> dict[str, str]:
        """Return the hosts that can't be asked right now, each with the reason."""
        return self._links.problems()

    @property
    def num_outstanding(self) -> int:
        """Calls whose reply hasn't been collected or dropped yet."""
        _, _, linked = self._links.snapshot()
        return sum(len(host.outstanding) + len(host.arrived) for host in linked.values())

    def link_kind(self, host_id: str) -> str:
        """Return "shm", "unix" or "tcp"; empty while there is no link to the host."""
        _, _, linked = self._links.snapshot()
        link = linked[host_id].link if host_id in linked else None
        return link.kind if link else ""

    def close(self) -> None:
        """Close every link and stop reconnecting."""
        self._links.close()

    def __enter__(self) -> ExpertRouter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, handle: DispatchHandle, plan: DispatchPlan) -> None:
        """Send each host's share that has a slot; what can't be sent becomes unassigned."""
        for share in plan.shares:
            selected = handle.routed.select(share.is_asked)
            if selected is not None and not self._send_call(handle, share, selected, plan.epoch):
                handle.unassigned.update(share.group_ids)
        handle.unassigned.update(plan.unreachable)

    def _send_call(
        self, handle: DispatchHandle, share: HostShare, selected: SelectedSlots, epoch: int
    ) -> bool:
        host = share.host
        link, call_id = host.link, next(self._call_ids)
        if link is None:
            return False
        hidden_states = selected.rows_of(handle.hidden_states)
        parts = wire.encode_call(
            call_id=call_id,
            epoch=epoch,
            layer_idx=handle.layer_idx,
            hidden_states=hidden_states,
            slot_table=selected.table,
        )
        host.outstanding.add(call_id)
        sent_at = time.perf_counter()
        try:
            link.send(parts, self._timeout_s)
        except LinkError as error:
            host.forget(call_id)
            self._count_failure(host)
            self._links.ban(host, link, str(error))
            return False
        handle.sent.append(_SentCall(host, link, call_id, share.group_ids, sent_at))
        return True

    def _current_plan(self) -> DispatchPlan:
        if self._plan.generation is not self._links.generation:
            group_ids = range(self._table.num_groups)
            self._plan = plan_dispatch(self._links, self._table, group_ids)
        return self._plan

    def _collect(self, handle: DispatchHandle, call: _SentCall, num_rows: list[int]) -> bool:
        """Take in one host's answer; False if its groups must be asked again elsewhere.

        `num_rows` counts the rows of each group.
        """
        start = time.perf_counter()
        host_id = call.host.host_id
        try:
            reply = call.host.receive(call.link, call.call_id, self._timeout_s)
            if reply.status is not wire.ReplyStatus.OK:  # the link is good: no reason for a ban
                for group_id in call.group_ids:
                    handle.refusals[host_id, group_id] = reply.reason
                self._count_failure(call.host)
                return False
            counts = [num_rows[group_id] for group_id in call.group_ids]
            shape = (sum(counts), handle.hidden_states.shape[1])
            if reply.rows.shape != shape or reply.rows.dtype is not handle.hidden_states.dtype:
                raise LinkError(f"{host_id} answered with rows of a wrong shape.")
        except LinkError as error:
            self._count_failure(call.host)
            self._links.ban(call.host, call.link, str(error))
            return False
        rows_of_groups = torch.split(reply.rows, counts)
        handle.group_rows.update(zip(call.group_ids, rows_of_groups, strict=True))
        call.host.num_bans = 0  # only an answer proves that it is well again
        # When an answer came that was there before it was asked for isn't known: the dense MLP's
        # time mustn't count, so the host's own time stands for it.
        waited_s = time.perf_counter() - start
        latency_s = min(start - call.sent_at, reply.compute_s) + waited_s
        handle.compute_s = max(handle.compute_s, reply.compute_s)
        self._stats.count_call(latency_s, reply.compute_s)
        if self._observer is not None:
            self._observer.answered(host_id, latency_s)
        return True

    def _count_failure(self, host: ExpertHostLink) -> None:
        """Count a call that must be asked again elsewhere."""
        self._stats.num_failures += 1
        if self._observer is not None:
            self._observer.failed(host.host_id)

    def _retry(self, handle: DispatchHandle) -> None:
        """Ask for the unassigned groups: another copy, else the fallback, else Unavailable."""
        group_ids, handle.unassigned = handle.unassigned, set()
        self._send(handle, plan_dispatch(self._links, self._table, group_ids, handle.refusals))
        if handle.sent:
            self._stats.num_retries += 1
        elif handle.unassigned:
            self._fall_back(handle)

    def _fall_back(self, handle: DispatchHandle) -> None:
        """Compute the unassigned groups here, or wait a while for their weights and leave them.

        Raises Unavailable where that can't be done.
        """
        needed = {
            group_id: selected
            for group_id in sorted(handle.unassigned)
            if (selected := handle.routed.select(self._table.experts_of([group_id]))) is not None
        }
        handle.unassigned.clear()
        if not needed:
            return
        if self._fallback is None or not self._fallback.can_hold(needed):
            refusals = {host_id: reason for (host_id, _), reason in handle.refusals.items()}
            raise Unavailable(
                f"No expert host answers for groups {list(needed)}: "
                f"{self._links.problems() | refusals}."
            )
        if not self._fallback.load(needed, WAIT_S):
            handle.unassigned.update(needed)  # a host may be back before the weights are here
            self._on_wait()
            return
        for group_id, selected in needed.items():
            handle.group_rows[group_id] = self._fallback.partials(
                group_id,
                handle.layer_idx,
                selected.rows_of(handle.hidden_states),
                selected.unpack(),
            )
        self._stats.num_fallbacks += 1
