"""The decoder's side of the expert hosts: the router, and the search for hosts that move."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from cluster.config import Config
from cluster.errors import Unavailable
from cluster.placement import ExpertPlacement
from deployments.decoder.host_directory import HostDirectory, HostInfo
from deployments.decoder.meters import ExpertMeter
from deployments.layout import transports
from deployments.loading import ModelSource
from experts.fallback import Fallback
from experts.router import ExpertRouter
from protos.briolette.v1.admin_pb2 import ClusterStatus, ExpertCalls, ExpertHost, Part

POLL_S = 0.2  # while hosts are missing at the start
LATE_HOST_S = 10.0  # for a host that has copies elsewhere; then the decoder starts without it


class RemoteExperts:
    """The expert hosts and the router to them; finds a host again that Serve has replaced.

    `router` knows no host before `wait_ready`, so the decoder's own weights can load meanwhile.
    """

    def __init__(
        self,
        *,
        config: Config,
        source: ModelSource,
        placement: ExpertPlacement,
        directory: HostDirectory,
        secret: bytes,
        meter: ExpertMeter,
    ) -> None:
        """Create the router; it connects to no host yet.

        Args:
            config: gives timeouts, transports and whether there is a fallback.
            source: the model, from which the fallback reads experts.
            placement: which host holds which groups.
            directory: finds the hosts.
            secret: the cluster's, for the handshake of links.
            meter: observes every expert call.
        """
        self._placement = placement
        self._directory = directory
        self._meter = meter
        self._on_wait: Callable[[], None] = lambda: None
        self._fallback: Fallback | None = None
        if config.experts.fallback == "auto":
            self._fallback = Fallback(
                source.spec,
                source.checkpoint,
                placement.groups,
                dtype=source.dtype,
                batch_invariant=config.batch_invariant,
            )
        self.router = ExpertRouter(
            source.spec,
            placement,
            {},
            secret=secret,
            weights_hash=source.checkpoint.fingerprint,
            fallback=self._fallback,
            timeout_s=config.experts.timeout_s,
            transports=transports(config),
            observer=meter,
            on_wait=lambda: self._on_wait(),
        )

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until every host is linked, but for late ones whose groups others hold too.

        Raises:
            Unavailable: a group has no host after `timeout_s`; names the hosts and the reasons.
        """
        give_up_at = time.monotonic() + timeout_s
        go_on_at: float | None = None  # since each group has a copy
        while missing := self.router.problems():
            now = time.monotonic()
            if self._dead_groups(missing):
                go_on_at = None
                if now > give_up_at:
                    raise Unavailable(f"Expert hosts don't start: {missing}.")
            else:
                go_on_at = go_on_at or now + LATE_HOST_S
                if now > go_on_at:
                    return
            if not self._look_for(missing):
                time.sleep(POLL_S)

    def watch(self, on_change: Callable[[], None], on_wait: Callable[[], None]) -> None:
        """Start to follow hosts that Serve replaces.

        Args:
            on_change: called in a background thread after a host was found in a new place.
            on_wait: called once a second, in the thread that dispatches, while an expert call
                waits for the fallback to load weights.
        """
        self._on_wait = on_wait

        def moved() -> None:
            self.router.use(self._placement, self._directory.endpoints)
            on_change()

        self._directory.watch(self.router.problems, moved)

    def fill_status(self, status: ClusterStatus) -> None:
        """Write the state of hosts and calls. Never waits; runs in the thread that dispatches."""
        problems = self.router.problems()
        status.expert_hosts.extend(
            self._host_status(host, problems) for host in self._directory.hosts
        )
        self._fill_health(status, self._dead_groups(problems))
        stats = self.router.stats()
        self._meter.update(self._placement, stats, problems)
        status.expert_calls.CopyFrom(
            ExpertCalls(
                num_calls=stats.num_calls,
                num_retries=stats.num_retries,
                p50_s=stats.latency_quantile_s(0.5),
                p99_s=stats.latency_quantile_s(0.99),
                hidden_share=stats.hidden_share,
            )
        )

    def close(self) -> None:
        """Stop looking for hosts and close all links."""
        self._directory.close()
        self.router.close()

    def _look_for(self, missing: Mapping[str, str]) -> bool:
        """Ask for these hosts; True if one was found in a new place."""
        if not any([self._directory.look(host_id) for host_id in missing]):
            return False
        self.router.use(self._placement, self._directory.endpoints)
        return True

    def _dead_groups(self, problems: Mapping[str, str]) -> list[int]:
        """Return the groups that no linked host holds."""
        return [
            group_id
            for group_id, hosts in enumerate(self._placement.group_to_hosts)
            if all(host in problems for host in hosts)
        ]

    def _fill_health(self, status: ClusterStatus, dead_groups: list[int]) -> None:
        """Set readiness: a group without a host is left to the fallback, or ends the service."""
        if dead_groups:
            status.reason = f"No expert host is alive for groups {', '.join(map(str, dead_groups))}"
            if self._fallback is not None and self._fallback.can_hold(dead_groups):
                status.reason += "; the decoder computes them, slower."
                if loading := self._fallback.loading:
                    groups = ", ".join(map(str, loading))
                    status.reason += f" It is loading the experts of groups {groups}."
            else:
                status.ready = False
                status.reason += "."
        elif self._fallback is not None:
            self._fallback.free()

    def _host_status(self, host: HostInfo, problems: Mapping[str, str]) -> ExpertHost:
        return ExpertHost(
            host_id=host.host_id,
            part=Part(
                pid=host.pid,
                device=host.device,
                metrics_port=host.metrics_port,
                kernels=host.kernels,
            ),
            group_ids=host.group_ids,
            visible_devices=host.visible_devices,
            link="" if host.host_id in problems else self.router.link_kind(host.host_id),
        )
