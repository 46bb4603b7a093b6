"""The expert hosts that a router knows: a warm link to each, bans with backoff, reconnecting."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.errors import LinkError, LinkTimeout
from cluster.links.connect import Endpoint, Link, connect
from cluster.placement import ExpertPlacement
from experts import wire

CONNECT_TIMEOUT_S = 2.0  # for one attempt
HEARTBEATS_PER_TIMEOUT = 4  # that a computing host sends within the longest silence
LONGEST_CALL_S = 60.0  # for a host that goes on saying that it computes
FIRST_BAN_S, LONGEST_BAN_S = 0.1, 10.0

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class ExpertHostLink:
    """One expert host as the router sees it. `link` is None while it can't be asked."""

    host_id: str
    endpoint: Endpoint
    link: Link | None = None
    has_left: bool = False  # the placement
    num_bans: int = 0  # since it last answered
    retry_at: float = 0.0  # on time.monotonic's clock
    problem: str = "not connected yet"
    outstanding: set[int] = field(default_factory=set)  # ids of calls without a reply
    arrived: dict[int, wire.ExpertReply] = field(default_factory=dict)  # by the id of the call

    def receive(self, link: Link, call_id: int, timeout_s: float) -> wire.ExpertReply:
        """Wait for the reply to a call; replies to others that come first are kept for them.

        Args:
            link: the link that the call was sent over.
            call_id: of the call.
            timeout_s: the longest silence. A host that says that it is still computing is waited
                for up to LONGEST_CALL_S.

        Raises:
            LinkError: no reply came.
        """
        if link is not self.link:
            raise LinkError("The link was closed since.")
        give_up_at = time.monotonic() + LONGEST_CALL_S
        try:
            while (reply := self.arrived.pop(call_id, None)) is None:
                came = wire.decode_reply(link.recv(timeout_s))
                if came.status is wire.ReplyStatus.COMPUTING:
                    if time.monotonic() > give_up_at:
                        raise LinkError(f"{self.host_id} took more than {LONGEST_CALL_S:g} s.")
                elif came.call_id in self.outstanding:  # else: abandoned
                    self.outstanding.discard(came.call_id)
                    self.arrived[came.call_id] = came
        except LinkTimeout:
            raise LinkError(f"{self.host_id} was silent for {timeout_s:g} s.") from None
        return reply

    def forget(self, call_id: int) -> None:
        """Drop the reply to an abandoned call, now or when it comes."""
        self.outstanding.discard(call_id)
        self.arrived.pop(call_id, None)


class ExpertHostLinks:
    """The links of a router.

    The engine's thread uses and bans them; a background thread, alive only while a link is missing,
    opens them again, so that no step waits for a connection.
    """

    def __init__(
        self, secret: bytes, weights_hash: str, transports: Sequence[str], timeout_s: float
    ) -> None:
        """Prepare for `use`, which names the hosts.

        Args:
            secret: of the cluster, for the handshake.
            weights_hash: the fingerprint of the decoder's checkpoint, which hosts must share.
            transports: kinds of links to try, in order.
            timeout_s: the silence after which a host is taken for dead.
        """
        self.placement: ExpertPlacement
        self.generation = object()  # replaced whenever a link opens or closes
        self._secret, self._weights_hash = secret, weights_hash
        self._transports, self._heartbeat_s = transports, timeout_s / HEARTBEATS_PER_TIMEOUT
        self._hosts: dict[str, ExpertHostLink] = {}
        self._changed = threading.Condition()
        self._reconnecting: threading.Thread | None = None
        self._is_closed = False

    def use(self, placement: ExpertPlacement, endpoints: Mapping[str, Endpoint]) -> None:
        """Know the hosts of this placement and no others.

        New ones are connected to before they are asked, so that no call finds a gap, and in the
        background if they can't be reached at once. A host without an endpoint can't be asked yet.
        """
        before, after = self._hosts, dict[str, ExpertHostLink]()
        for host_id in [host_id for host_id in placement.host_ids if host_id in endpoints]:
            old, endpoint = before.get(host_id), endpoints[host_id]
            stays = old is not None and old.endpoint == endpoint
            after[host_id] = old if old and stays else ExpertHostLink(host_id, endpoint)
        for host in after.values():
            if host.link is None:
                self._connect(host, placement.epoch)
        with self._changed:
            self._hosts, self.placement = after, placement
            kept = () if self._is_closed else after.values()
            left = [host for host in {*before.values(), *after.values()} if host not in kept]
            for host in left:
                host.has_left = True
            self._advance_generation()
        for host in left:
            self._drop(host, "it left the placement")
        with self._changed:
            self._start_reconnecting()

    def snapshot(self) -> tuple[object, ExpertPlacement, dict[str, ExpertHostLink]]:
        """Return the generation, its placement, and the linked hosts by id."""
        with self._changed:
            linked = {host_id: host for host_id, host in self._hosts.items() if host.link}
            return self.generation, self.placement, linked

    def problems(self) -> dict[str, str]:
        """Return the hosts without a link, each with the reason."""
        with self._changed:
            unknown = {host_id: "not started yet" for host_id in self.placement.host_ids}
            for host_id in self._hosts:
                unknown.pop(host_id, None)
            unlinked = {
                host.host_id: host.problem for host in self._hosts.values() if not host.link
            }
            return unknown | unlinked

    def wait_for_change(self, timeout_s: float) -> None:
        """Return when a link opened or closed, or after `timeout_s`."""
        with self._changed:
            self._changed.wait(timeout_s)

    def ban(self, host: ExpertHostLink, link: Link, problem: str) -> None:
        """Close a link that failed, and reconnect after a backoff that doubles until a call is
        answered. A link that was replaced meanwhile is left alone.
        """
        if host.link is not link:
            return
        self._back_off(host)
        self._drop(host, problem)
        with self._changed:
            self._start_reconnecting()

    def close(self) -> None:
        """Close every link and end the background thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            thread = self._reconnecting
        if thread is not None:
            thread.join(2 * CONNECT_TIMEOUT_S)
        for host in self._hosts.values():
            self._drop(host, "the router is closed")

    def _drop(self, host: ExpertHostLink, problem: str) -> None:
        with self._changed:
            link, host.link, host.problem = host.link, None, problem
            host.outstanding.clear()
            host.arrived.clear()
            self._advance_generation()
        if link is not None:
            link.close()

    def _connect(self, host: ExpertHostLink, epoch: int) -> None:
        hello = wire.RouterHello(
            host_id=host.host_id,
            weights_hash=self._weights_hash,
            epoch=epoch,
            heartbeat_s=self._heartbeat_s,
        )
        try:
            link = connect(
                host.endpoint, self._secret, hello.encode(), CONNECT_TIMEOUT_S, self._transports
            )
        except LinkError as error:
            self._put_off(host, str(error))
            return
        # border: one host's connection; the others go on being tried, whatever is wrong with it.
        except Exception as error:
            log.exception("Connecting to %s failed.", host.host_id)
            self._put_off(host, f"{type(error).__name__} while connecting: {error}")
            return
        with self._changed:
            is_wanted = not self._is_closed and not host.has_left and not host.link
            if is_wanted:
                host.link = link
                self._advance_generation()
        if not is_wanted:
            link.close()

    def _put_off(self, host: ExpertHostLink, problem: str) -> None:
        with self._changed:
            host.problem = problem
            self._back_off(host)

    def _back_off(self, host: ExpertHostLink) -> None:
        host.num_bans += 1
        host.retry_at = time.monotonic() + _ban_s(host.num_bans)

    def _advance_generation(self) -> None:
        self.generation = object()
        self._changed.notify_all()

    def _start_reconnecting(self) -> None:
        is_missing = any(host.link is None for host in self._hosts.values())
        is_trying = self._reconnecting is not None and self._reconnecting.is_alive()
        if is_missing and not is_trying and not self._is_closed:
            self._reconnecting = threading.Thread(
                target=self._reconnect, name="expert-reconnect", daemon=True
            )
            self._reconnecting.start()

    def _reconnect(self) -> None:
        while True:
            with self._changed:
                missing = [host for host in self._hosts.values() if host.link is None]
                if self._is_closed or not missing:
                    self._reconnecting = None
                    return
                host = min(missing, key=lambda host: host.retry_at)
                wait_s = host.retry_at - time.monotonic()
                if wait_s > 0:
                    self._changed.wait(wait_s)
                    continue
                epoch = self.placement.epoch
            self._connect(host, epoch)


def _ban_s(num_bans: int) -> float:
    return float(min(LONGEST_BAN_S, FIRST_BAN_S * 2 ** min(num_bans - 1, 16)))
