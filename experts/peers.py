"""The hosts that a router knows: one warm link each, bans with backoff, reconnecting aside."""

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

CONNECT_S = 2.0  # for one attempt
BEATS_A_DEADLINE = 4  # signs of life that a computing host owes within the time of silence
LONGEST_CALL_S = 60.0  # for a host that says all the time that it is still computing
FIRST_BAN_S, LONGEST_BAN_S = 0.1, 10.0

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Peer:
    """One expert host as the router sees it. `link` is None while it can't be asked."""

    host_id: str
    endpoint: Endpoint
    link: Link | None = None
    has_left: bool = False  # the placement
    num_bans: int = 0  # since it last answered
    retry_at_s: float = 0.0  # on time.monotonic's clock
    problem: str = "not connected yet"
    outstanding: set[int] = field(default_factory=set)  # calls on this link without a reply
    arrived: dict[int, wire.Reply] = field(default_factory=dict)  # for calls collected later

    def receive(self, link: Link, call_id: int, deadline_s: float) -> wire.Reply:
        """The reply to a call, whatever else comes before it. `deadline_s` is for silence; a host
        that says that it is still computing is waited for up to LONGEST_CALL_S.

        Raises LinkError when it doesn't come.
        """
        if link is not self.link:
            raise LinkError("The link was closed since.")
        give_up_at = time.monotonic() + LONGEST_CALL_S
        try:
            while (reply := self.arrived.pop(call_id, None)) is None:
                came = wire.decode_reply(link.recv(deadline_s))
                if came.status is wire.Status.COMPUTING:
                    if time.monotonic() > give_up_at:
                        raise LinkError(f"{self.host_id} took more than {LONGEST_CALL_S:g} s.")
                elif came.call_id in self.outstanding:  # else: abandoned
                    self.outstanding.discard(came.call_id)
                    self.arrived[came.call_id] = came
        except LinkTimeout:
            raise LinkError(f"{self.host_id} was silent for {deadline_s:g} s.") from None
        return reply

    def forget(self, call_id: int) -> None:
        """Nobody will collect this call: drop its reply, now or when it comes."""
        self.outstanding.discard(call_id)
        self.arrived.pop(call_id, None)


class Peers:
    """The links of a router. The engine's thread uses and bans them; a background thread, alive
    only while a link is missing, opens them again, so that no step waits for a connection.
    """

    def __init__(
        self, secret: bytes, weights_hash: str, transports: Sequence[str], deadline_s: float
    ) -> None:
        """`deadline_s`: the silence after which a host will be taken for dead."""
        self.placement: ExpertPlacement
        self.generation = object()  # another one whenever a link opens or closes
        self._secret, self._weights_hash = secret, weights_hash
        self._transports, self._beat_s = transports, deadline_s / BEATS_A_DEADLINE
        self._peers: dict[str, Peer] = {}
        self._changed = threading.Condition()
        self._reconnecting: threading.Thread | None = None
        self._is_closed = False

    def use(self, placement: ExpertPlacement, endpoints: Mapping[str, Endpoint]) -> None:
        """Know these hosts and no others. New ones are connected to before they are asked, so that
        no call finds a gap; in the background if they can't be reached at once. A host without an
        endpoint can't be asked yet.
        """
        before, after = self._peers, dict[str, Peer]()
        for host_id in [host for host in placement.host_ids if host in endpoints]:
            old, endpoint = before.get(host_id), endpoints[host_id]
            stays = old is not None and old.endpoint == endpoint
            after[host_id] = old if old and stays else Peer(host_id, endpoint)
        for peer in after.values():
            if peer.link is None:
                self._connect(peer, placement.epoch)
        with self._changed:
            self._peers, self.placement = after, placement
            kept = () if self._is_closed else after.values()
            left = [peer for peer in {*before.values(), *after.values()} if peer not in kept]
            for peer in left:
                peer.has_left = True
            self._bump()
        for peer in left:
            self._drop(peer, "it left the placement")
        with self._changed:
            self._start_reconnecting()

    def snapshot(self) -> tuple[object, ExpertPlacement, dict[str, Peer]]:
        """The generation, its placement, and the hosts that can be asked in it."""
        with self._changed:
            alive = {host_id: peer for host_id, peer in self._peers.items() if peer.link}
            return self.generation, self.placement, alive

    def problems(self) -> dict[str, str]:
        """Why each host that has no link has none."""
        with self._changed:
            unknown = {host: "not started yet" for host in self.placement.host_ids}
            for host in self._peers:
                unknown.pop(host, None)
            unlinked = {host: peer.problem for host, peer in self._peers.items() if not peer.link}
            return unknown | unlinked

    def wait_for_change(self, timeout_s: float) -> None:
        """Return when a link opened or closed, or after `timeout_s`."""
        with self._changed:
            self._changed.wait(timeout_s)

    def ban(self, peer: Peer, link: Link, problem: str) -> None:
        """Close a link that failed; its host is tried again after a while, twice as long each time
        until it answers a call. A link that was replaced meanwhile is left alone.
        """
        if peer.link is not link:
            return
        peer.num_bans += 1
        peer.retry_at_s = time.monotonic() + _ban_s(peer.num_bans)
        self._drop(peer, problem)
        with self._changed:
            self._start_reconnecting()

    def close(self) -> None:
        """Close every link and end the background thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            thread = self._reconnecting
        if thread is not None:
            thread.join(2 * CONNECT_S)
        for peer in self._peers.values():
            self._drop(peer, "the router is closed")

    def _drop(self, peer: Peer, problem: str) -> None:
        with self._changed:
            link, peer.link, peer.problem = peer.link, None, problem
            peer.outstanding.clear()
            peer.arrived.clear()
            self._bump()
        if link is not None:
            link.close()

    def _connect(self, peer: Peer, epoch: int) -> None:
        hello = wire.Hello(peer.host_id, self._weights_hash, epoch, self._beat_s).encode()
        try:
            link = connect(peer.endpoint, self._secret, hello, CONNECT_S, self._transports)
        except LinkError as error:
            self._put_off(peer, str(error))
            return
        except Exception as error:  # the border of the expert call: other hosts go on being tried
            log.exception("Connecting to %s failed.", peer.host_id)
            self._put_off(peer, f"{type(error).__name__} while connecting: {error}")
            return
        with self._changed:
            is_wanted = not self._is_closed and not peer.has_left and not peer.link
            if is_wanted:
                peer.link = link
                self._bump()
        if not is_wanted:
            link.close()

    def _put_off(self, peer: Peer, problem: str) -> None:
        """It couldn't be connected to: wait before the next attempt."""
        with self._changed:
            peer.problem = problem
            peer.num_bans += 1
            peer.retry_at_s = time.monotonic() + _ban_s(peer.num_bans)

    def _bump(self) -> None:
        self.generation = object()
        self._changed.notify_all()

    def _start_reconnecting(self) -> None:
        missing = any(peer.link is None for peer in self._peers.values())
        is_trying = self._reconnecting is not None and self._reconnecting.is_alive()
        if missing and not is_trying and not self._is_closed:
            self._reconnecting = threading.Thread(
                target=self._reconnect, name="expert-reconnect", daemon=True
            )
            self._reconnecting.start()

    def _reconnect(self) -> None:
        while True:
            with self._changed:
                missing = [peer for peer in self._peers.values() if peer.link is None]
                if self._is_closed or not missing:
                    self._reconnecting = None
                    return
                peer = min(missing, key=lambda peer: peer.retry_at_s)
                wait_s = peer.retry_at_s - time.monotonic()
                if wait_s > 0:
                    self._changed.wait(wait_s)
                    continue
                epoch = self.placement.epoch
            self._connect(peer, epoch)


def _ban_s(num_bans: int) -> float:
    return float(min(LONGEST_BAN_S, FIRST_BAN_S * 2 ** min(num_bans - 1, 16)))
