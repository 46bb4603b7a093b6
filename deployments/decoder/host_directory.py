"""The addresses of the expert hosts, asked of Serve: at the start, and again after a loss.

Two background threads bring a lost host back, and both are needed. The router's (`experts`) only
connects to the address that it knows, with backoff: a link that broke while the host lives is open
again after milliseconds, without Serve. A host that Serve has replaced listens at a new address,
which only Serve knows; the thread here asks for it and hands it to the router.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import LinkError
from cluster.links.connect import Endpoint
from deployments.process.serve_handles import Handle, ask_replicas

WATCH_PERIOD_S = 0.5  # between two checks of the links

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostInfo:
    """A running host, as it describes itself."""

    host_id: str
    pid: int
    device: str
    kernels: str
    visible_devices: str
    metrics_port: int
    group_ids: tuple[int, ...]
    endpoint: Endpoint

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> HostInfo:
        """Read what `ExpertHostReplica.describe` returns.

        Raises:
            KeyError, TypeError, ValueError: It can't be read.
        """
        values = {**fields, "endpoint": Endpoint.from_dict(fields["endpoint"])}
        return HostInfo(**{**values, "group_ids": tuple(fields["group_ids"])})


class HostDirectory:
    """The last known address of every host, which stays known while Serve can't be asked."""

    def __init__(self, handles: Mapping[str, Handle]) -> None:
        """Take the Serve handle of every host, by host id; asks none yet."""
        self._handles = handles
        self._hosts: dict[str, HostInfo] = {}
        self._stopping = threading.Event()

    @property
    def hosts(self) -> list[HostInfo]:
        """The hosts that were found, by host id."""
        return [self._hosts[host_id] for host_id in sorted(self._hosts)]

    @property
    def endpoints(self) -> dict[str, Endpoint]:
        """The endpoints of the hosts that were found, by host id."""
        return {host.host_id: host.endpoint for host in self._hosts.values()}

    def look(self, host_id: str) -> bool:
        """Ask Serve for one host; returns True if it is new or has moved."""
        try:
            answers = ask_replicas(self._handles[host_id], "describe")
            found = [HostInfo.from_dict(answer) for answer in answers]
        except LinkError as error:
            log.debug("%s: %s", host_id, error)
            return False
        except (KeyError, TypeError, ValueError) as error:
            log.warning("The description of %s can't be read: %r", host_id, error)
            return False
        if not found or found[-1] == self._hosts.get(host_id):
            return False
        self._hosts[host_id] = found[-1]
        log.info("%s is process %d.", host_id, found[-1].pid)
        return True

    def watch(
        self, problems: Callable[[], Mapping[str, str]], on_moved: Callable[[], None]
    ) -> None:
        """Start the thread that looks for lost hosts.

        Args:
            problems: Returns the hosts that can't be reached, with the reasons.
            on_moved: Called in that thread after a host was found at a new address.
        """
        threading.Thread(
            target=self._watch, args=(problems, on_moved), name="host directory", daemon=True
        ).start()

    def close(self) -> None:
        """End the thread after its present round."""
        self._stopping.set()

    def _watch(
        self, problems: Callable[[], Mapping[str, str]], on_moved: Callable[[], None]
    ) -> None:
        have_moved = False
        while not self._stopping.wait(WATCH_PERIOD_S):
            try:
                have_moved |= any([self.look(host_id) for host_id in problems()])
                if have_moved:
                    on_moved()
                    have_moved = False
            except Exception:  # border: one round; without this thread no moved host is found
                log.exception("Looking for expert hosts failed; the next round tries again.")
