"""The decoder's side of the expert hosts: the router and where it finds them, through losses."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from cluster.config import Config
from cluster.errors import Unavailable
from cluster.placement import ExpertPlacement
from deployments.decoder.host_directory import HostDirectory, HostInfo
from deployments.decoder.meters import ExpertMeter
from deployments.layout import transports
from deployments.loading import Source
from experts.fallback import Fallback
from experts.router import ExpertRouter
from protos.briolette.v1.admin_pb2 import ClusterStatus, ExpertCalls, ExpertHost, Part

POLL_S = 0.2  # while hosts are missing at the start
LATE_HOST_S = 10.0  # for a host whose groups others hold too; then the decoder starts without it


class RemoteExperts:
    """The hosts and the router to them, kept together through losses.

    `router` knows no host before `wait_ready`, so the decoder's own weights can load meanwhile.
    """

    def __init__(
        self,
        config: Config,
        source: Source,
        placement: ExpertPlacement,
        directory: HostDirectory,
        secret: bytes,
        meter: ExpertMeter,
    ) -> None:
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
                source.dtype,
                config.batch_invariant,
            )
        self.router = ExpertRouter(
            source.spec,
            placement,
            {},
            secret,
            source.checkpoint.fingerprint,
            self._fallback,
            deadline_s=config.experts.timeout_s,
            transports=transports(config),
            observer=meter,
            on_wait=lambda: self._on_wait(),
        )

    def wait_ready(self, timeout_s: float) -> None:
        """Until every host is linked, or a copy of each group is and the others are late.

        Raises Unavailable with the reasons when a group is still without a host after `timeout_s`.
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
        """Follow hosts that Serve replaces. `on_wait` is called once a second, in the thread that
        dispatches, while that waits for weights.
        """
        self._on_wait = on_wait

        def moved() -> None:
            self.router.use(self._placement, self._directory.endpoints)
            on_change()

        self._directory.watch(self.router.problems, moved)

    def fill_status(self, status: ClusterStatus) -> None:
        """Write what the experts know; in the thread that dispatches, and never waits."""
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
        self._directory.close()
        self.router.close()

    def _look_for(self, missing: Mapping[str, str]) -> bool:
        """True when one was found somewhere new."""
        if not any([self._directory.look(host_id) for host_id in missing]):
            return False
        self.router.use(self._placement, self._directory.endpoints)
        return True

    def _dead_groups(self, problems: Mapping[str, str]) -> list[int]:
        """The groups that no linked host holds."""
        return [
            group_id
            for group_id, hosts in enumerate(self._placement.group_to_hosts)
            if all(host in problems for host in hosts)
        ]

    def _fill_health(self, status: ClusterStatus, dead_groups: list[int]) -> None:
        """Groups without a host end the service, unless the decoder can compute them itself."""
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
