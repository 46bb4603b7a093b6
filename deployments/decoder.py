"""The decoder in a Serve replica: the model, its experts, the step loop, its gateways."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from cluster.config import Config
from cluster.errors import Unavailable
from cluster.links import Listener
from cluster.metrics import Metrics, start_metrics_server
from cluster.placement import ExpertPlacement
from deployments.meters import EngineMeter
from deployments.expert_meter import ExpertMeter
from deployments.host_directory import Handle, HostDirectory, HostInfo
from deployments.layout import decoder_threads, expert_groups, place_experts, transports
from deployments.loading import Source, load_engine, load_local_experts, warm_up
from deployments.start_report import Reporter, reporting
from deployments.step_loop import StepLoop
from deployments.decoder_link import GatewayLinks, verify_gateway
from experts.router import ExpertRouter
from protos.briolette.v1.admin_pb2 import ClusterStatus, ExpertCalls, ExpertHost, Part


class DecoderReplica:
    """One attention-side replica. Ready, with a token produced, when the constructor returns."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Mapping[str, Any], secret: bytes, *hosts: Handle
    ) -> None:
        await asyncio.to_thread(self._start, Config.from_dict(settings), secret, hosts)

    def _start(self, config: Config, secret: bytes, hosts: tuple[Handle, ...]) -> None:
        """Off the replica's loop, on which Serve answers handles and health checks."""
        with reporting(config.state_dir, "decoder") as reporter:
            self._config = config
            self._source = Source.open(config)
            self._registry = CollectorRegistry()
            self._metrics = Metrics(self._registry)
            torch.set_num_threads(decoder_threads(config, len(hosts)))
            placement = place_experts(config, self._source.spec)
            if placement is None:
                self._experts = None
                self._load_local(reporter)
            else:
                handles = dict(zip(placement.host_ids, hosts, strict=True))
                meter = ExpertMeter(self._metrics, config.model_id)
                self._experts = RemoteExperts(placement, HostDirectory(handles), meter)
                router = self._experts.connect(config, self._source, secret)
                self._engine = load_engine(config, self._source, router, reporter.progress)
            warm_up(self._engine)
            self._start_serving(secret)

    def endpoint(self) -> dict[str, Any]:
        """Where gateways link to."""
        return self._listener.endpoint.to_dict()

    def record_replica_metadata(self) -> dict[str, Any]:
        return {"endpoint": self.endpoint()}

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if not self._loop.is_alive:
            raise Unavailable("The step loop has ended.")

    def __del__(self) -> None:
        if hasattr(self, "_loop"):
            self._loop.close()
            if self._experts is not None:
                self._experts.close()

    def _load_local(self, reporter: Reporter) -> None:
        experts = load_local_experts(self._config, self._source)
        self._engine = load_engine(self._config, self._source, experts, reporter.progress)

    def _start_serving(self, secret: bytes) -> None:
        config = self._config
        self._metrics_port = start_metrics_server(config.gateway.host, 0, self._registry).port
        meter = EngineMeter(self._metrics, config.model_id)
        self._loop = StepLoop(self._engine, meter, self._fill_status)
        self._listener = Listener(secret, verify_gateway, transports=transports(config))
        self._loop.start(
            GatewayLinks(
                self._listener, self._loop.greeting, self._loop.on_message, self._loop.on_lost
            )
        )
        if self._experts is not None:
            self._experts.watch(self._loop.wake)

    def _fill_status(self, status: ClusterStatus) -> None:
        spec = self._source.spec
        status.ready = True
        status.model, status.kind = self._config.model_id, spec.model_type
        status.context_tokens = self._engine.limits.max_model_len
        status.vocab_size = spec.vocab_size
        status.decoder.CopyFrom(
            Part(pid=os.getpid(), device=str(self._source.device), metrics_port=self._metrics_port)
        )
        if spec.is_moe:
            num_groups = expert_groups(self._config, spec).num_groups
            status.experts = (
                f"{spec.num_experts} experts, top {spec.top_k_experts}, in {num_groups} groups"
            )
        if self._experts is not None:
            self._experts.fill_status(status)


class RemoteExperts:
    """The hosts and the router to them, kept together through losses."""

    def __init__(
        self, placement: ExpertPlacement, directory: HostDirectory, meter: ExpertMeter
    ) -> None:
        self.placement = placement
        self.directory = directory
        self.router: ExpertRouter
        self._meter = meter

    def connect(self, config: Config, source: Source, secret: bytes) -> ExpertRouter:
        """Wait for every host and link to it. Raises Unavailable when one stays away."""
        self.directory.wait_for_all(config.ray.start_timeout_s)
        self.router = ExpertRouter(
            source.spec,
            self.placement,
            self.directory.endpoints,
            secret,
            source.checkpoint.fingerprint,
            deadline_s=config.experts.deadline_s,
            transports=transports(config),
            observer=self._meter,
        )
        self.router.wait_ready(config.ray.start_timeout_s)
        return self.router

    def watch(self, on_change: Callable[[], None]) -> None:
        """Follow hosts that Serve replaces."""

        def moved() -> None:
            self.router.use(self.placement, self.directory.endpoints)
            on_change()

        self.directory.watch(self.router.problems, moved)

    def fill_status(self, status: ClusterStatus) -> None:
        problems = self.router.problems()
        status.expert_hosts.extend(
            self._host_status(host, problems) for host in self.directory.hosts
        )
        dead = [
            group_id
            for group_id, hosts in enumerate(self.placement.group_to_hosts)
            if all(host in problems for host in hosts)
        ]
        if dead:
            status.ready = False
            status.reason = f"No expert host is alive for groups {', '.join(map(str, dead))}."
        stats = self.router.stats()
        self._meter.update(self.placement, stats, problems)
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
        self.directory.close()
        self.router.close()

    def _host_status(self, host: HostInfo, problems: Mapping[str, str]) -> ExpertHost:
        return ExpertHost(
            host_id=host.host_id,
            part=Part(pid=host.pid, device=host.device, metrics_port=host.metrics_port),
            group_ids=host.group_ids,
            visible_devices=host.visible_devices,
            link="" if host.host_id in problems else self.router.link_kind(host.host_id),
        )
