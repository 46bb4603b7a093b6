"""The hosts that a router knows: one warm link each, bans with backoff, reconnecting aside."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.errors import LinkError
from cluster.links import Endpoint, Link, LinkTimeout, connect
from cluster.placement import ExpertPlacement
from experts import wire

CONNECT_S = 2.0  # for one attempt
FIRST_BAN_S, LONGEST_BAN_S = 0.1, 10.0


@dataclass(slots=True, eq=False)
class Peer:
    """One expert host as the router sees it. `link` is None while it can't be asked."""

    host_id: str
    endpoint: Endpoint
    link: Link | None = None
    num_bans: int = 0  # since it last answered
    retry_at_s: float = 0.0  # on time.monotonic's clock
    problem: str = "not connected yet"
    outstanding: set[int] = field(default_factory=set)  # calls sent on this link
    arrived: dict[int, wire.Reply] = field(default_factory=dict)  # for calls collected later

    def receive(self, link: Link, call_id: int, deadline_s: float) -> wire.Reply:
        """The reply to a call, whatever else comes before it; `deadline_s` from now.

        Raises LinkError when it doesn't come.
        """
        if link is not self.link:
            raise LinkError("The link was closed since.")
        end = time.monotonic() + deadline_s
        try:
            while call_id not in self.arrived:
                reply = wire.decode_reply(link.recv(max(0.0, end - time.monotonic())))
                if reply.call_id in self.outstanding:
                    self.outstanding.discard(reply.call_id)
                    self.arrived[reply.call_id] = reply
        except LinkTimeout:
            raise LinkError(f"{self.host_id} was silent for too long.") from None
        return self.arrived.pop(call_id)


class Peers:
    """The links of a router. The engine's thread uses and bans them; a background thread, alive
    only while a link is missing, opens them again, so that no step waits for a connection.
    """

    def __init__(
        self, secret: bytes, weights_hash: str, transports: Sequence[str], spin_s: float
    ) -> None:
        self.placement: ExpertPlacement
        self.generation = object()  # another one whenever a link opens or closes
        self._secret, self._weights_hash = secret, weights_hash
        self._transports, self._spin_s = transports, spin_s
        self._peers: dict[str, Peer] = {}
        self._changed = threading.Condition()
        self._reconnecting: threading.Thread | None = None
        self._is_closed = False

    def use(self, placement: ExpertPlacement, endpoints: Mapping[str, Endpoint]) -> None:
        """Know these hosts and no others; new ones are connected to before this returns, or in the
        background if they can't be reached at once.
        """
        with self._changed:
            before, self._peers = self._peers, {}
            for host_id in placement.host_ids:
                old, endpoint = before.get(host_id), endpoints[host_id]
                stays = old is not None and old.endpoint == endpoint
                self._peers[host_id] = old if old and stays else Peer(host_id, endpoint)
            left = [peer for peer in before.values() if peer not in self._peers.values()]
            self.placement = placement
            self._bump()
        for peer in left:
            self._drop(peer, "it left the placement")
        for peer in list(self._peers.values()):
            if peer.link is None:
                self._connect(peer)
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
            return {host: peer.problem for host, peer in self._peers.items() if not peer.link}

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

    def _connect(self, peer: Peer) -> None:
        hello = wire.Hello(peer.host_id, self._weights_hash, self.placement.epoch).encode()
        try:
            link = connect(
                peer.endpoint, self._secret, hello, CONNECT_S, self._transports, self._spin_s
            )
        except LinkError as error:
            with self._changed:
                peer.problem = str(error)
                peer.num_bans += 1
                peer.retry_at_s = time.monotonic() + _ban_s(peer.num_bans)
            return
        with self._changed:
            is_wanted = not self._is_closed and peer in self._peers.values() and not peer.link
            if is_wanted:
                peer.link = link
                self._bump()
        if not is_wanted:
            link.close()

    def _bump(self) -> None:
        self.generation = object()
        self._changed.notify_all()

    def _start_reconnecting(self) -> None:
        missing = any(peer.link is None for peer in self._peers.values())
        if missing and self._reconnecting is None and not self._is_closed:
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
            self._connect(peer)


def _ban_s(num_bans: int) -> float:
    return float(min(LONGEST_BAN_S, FIRST_BAN_S * 2 ** min(num_bans - 1, 16)))
