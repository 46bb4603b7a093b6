"""Where the decoder's expert hosts are: found through Serve's handles, found again after a loss."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import LinkError
from cluster.links.connect import Endpoint
from deployments.process.serve_handles import Handle, ask_replicas

WATCH_S = 0.5  # between two looks at the links

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostInfo:
    """What a running host says of itself."""

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
        values = {**fields, "endpoint": Endpoint.from_dict(fields["endpoint"])}
        return HostInfo(**{**values, "group_ids": tuple(fields["group_ids"])})


class HostDirectory:
    """The last known whereabouts of every host; keeps them when Serve can't be asked."""

    def __init__(self, handles: Mapping[str, Handle]) -> None:
        self._handles = handles
        self._hosts: dict[str, HostInfo] = {}
        self._stopping = threading.Event()

    @property
    def hosts(self) -> list[HostInfo]:
        return [self._hosts[host_id] for host_id in sorted(self._hosts)]

    @property
    def endpoints(self) -> dict[str, Endpoint]:
        return {host.host_id: host.endpoint for host in self._hosts.values()}

    def look(self, host_id: str) -> bool:
        """Ask Serve for one host; True when it is somewhere else than before."""
        try:
            answers = ask_replicas(self._handles[host_id], "describe")
            found = [HostInfo.from_dict(answer) for answer in answers]
        except LinkError as error:
            log.debug("%s: %s", host_id, error)
            return False
        except (KeyError, TypeError, ValueError) as error:
            log.warning("%s describes itself in a way that can't be read: %r", host_id, error)
            return False
        if not found or found[-1] == self._hosts.get(host_id):
            return False
        self._hosts[host_id] = found[-1]
        log.info("%s is process %d.", host_id, found[-1].pid)
        return True

    def watch(
        self, problems: Callable[[], Mapping[str, str]], on_moved: Callable[[], None]
    ) -> None:
        """From now on, in a thread: look again for hosts that can't be reached.

        `problems()` names them with the reason; `on_moved()` is called after one was found in a
        new place.
        """
        threading.Thread(
            target=self._watch, args=(problems, on_moved), name="host directory", daemon=True
        ).start()

    def close(self) -> None:
        self._stopping.set()

    def _watch(
        self, problems: Callable[[], Mapping[str, str]], on_moved: Callable[[], None]
    ) -> None:
        have_moved = False
        while not self._stopping.wait(WATCH_S):
            try:
                have_moved |= any([self.look(host_id) for host_id in problems()])
                if have_moved:
                    on_moved()
                    have_moved = False
            except Exception:  # nobody else finds hosts again, so no one round may be the last
                log.exception("Looking for expert hosts failed this time.")
