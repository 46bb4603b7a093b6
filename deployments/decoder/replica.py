"""The decoder in a Serve replica: the model, its experts, the step loop, its gateways."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Mapping
from typing import Any

import torch

from cluster.config import Config
from cluster.errors import Unavailable
from cluster.links.connect import Listener
from cluster.metrics import Metrics, part_registry, start_metrics_server
from deployments.decoder.host_directory import HostDirectory
from deployments.decoder.kv.block_store import KVBlockStore, kv_tensors
from deployments.decoder.link import GatewayLinks, verify_gateway
from deployments.decoder.meters import EngineMeter, ExpertMeter
from deployments.decoder.remote_experts import RemoteExperts
from deployments.decoder.step_loop import StepLoop
from deployments.layout import decoder_threads, expert_groups, place_experts, transports
from deployments.loading import (
    Source,
    fingerprint,
    load_engine,
    load_local_experts,
    warm_up,
)
from deployments.messages import to_group_load, to_kv_store
from deployments.process.priority import go_first
from deployments.process.report import Reporter, reporting
from deployments.process.serve_handles import Handle
from deployments.redis_store import Budgets, open_kv_store, store_address
from engine.core import EngineCore
from engine.model.decoder_layer import Experts
from engine.prefill_meter import PrefillMeter
from engine.runner import ModelRunner
from experts.load import ExpertLoad
from protos.briolette.v1.admin_pb2 import ClusterStatus, Part

FLUSH_S = 3.0  # at the end, for what waits to be written to the store


class DecoderReplica:
    """One attention-side replica. Ready, with a token produced, when the constructor returns."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Mapping[str, Any], secret: bytes, *hosts: Handle
    ) -> None:
        await asyncio.to_thread(self._start, Config.from_dict(settings), secret, hosts)

    def _start(self, config: Config, secret: bytes, hosts: tuple[Handle, ...]) -> None:
        """Off the replica's loop, on which Serve answers handles and health checks."""
        go_first()
        with reporting(config.state_dir, "decoder") as reporter:
            self._config = config
            self._source = Source.open(config)
            self._registry = part_registry()
            self._metrics = Metrics(self._registry)
            self._store: KVBlockStore | None = None
            self._expert_load: ExpertLoad | None = None
            self._budgets = Budgets(config.store.tenant_bytes)
            torch.set_num_threads(decoder_threads(config, len(hosts)))
            placement = place_experts(config, self._source.spec)
            if placement is None:
                self._experts = None
                self._load_local(reporter)
            else:
                directory = HostDirectory(dict(zip(placement.host_ids, hosts, strict=True)))
                meter = ExpertMeter(self._metrics, config.model_id)
                self._experts = RemoteExperts(
                    config, self._source, placement, directory, secret, meter
                )
                router = self._experts.router
                self._expert_load = router.load
                self._engine = self._load(router, reporter)
                self._experts.wait_ready(config.ray.start_timeout_s)
            warm_up(self._engine)
            gc.collect()
            gc.freeze()  # else each full collection holds up a step for as long as 0.1 s
            self._start_serving(secret)

    def endpoint(self) -> dict[str, Any]:
        """Where gateways link to."""
        return self._listener.endpoint.to_dict()

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if (problem := self._loop.problem()) is not None:
            raise Unavailable(problem)

    def __del__(self) -> None:
        if hasattr(self, "_loop"):
            self._loop.close()
            if self._store is not None:
                self._store.flush(FLUSH_S)
                self._store.close()
            if self._experts is not None:
                self._experts.close()

    def _load_local(self, reporter: Reporter) -> None:
        experts = load_local_experts(self._config, self._source, reporter.progress)
        if experts is not None and self._source.device.type == "cpu":  # a GPU's aren't counted
            self._expert_load = experts.load
        self._engine = self._load(experts, reporter)

    def _load(self, experts: Experts | None, reporter: Reporter) -> EngineCore:
        return load_engine(
            self._config, self._source, experts, reporter.progress, self._connect_store
        )

    def _connect_store(self, runner: ModelRunner, meter: PrefillMeter) -> KVBlockStore | None:
        config, address = self._config, store_address(self._config)
        if address is not None:
            self._store = KVBlockStore(
                kv_tensors(runner),
                config.engine.block_size,
                self._source.spec.sliding_window,
                fingerprint(config, self._source),
                lambda whole: open_kv_store(
                    config, address, whole, self._metrics, self._budgets.of
                ),
                meter.seconds,
            )
        return self._store

    def _start_serving(self, secret: bytes) -> None:
        config = self._config
        self._metrics_port = start_metrics_server(
            config.gateway.metrics_host, 0, self._registry
        ).port
        meter = EngineMeter(self._metrics, config.model_id)
        self._loop = StepLoop(
            self._engine, meter, self._fill_status, self._store, self._budgets.set
        )
        self._listener = Listener(secret, verify_gateway, transports=transports(config))
        self._loop.start(
            GatewayLinks(
                self._listener, self._loop.greeting, self._loop.on_message, self._loop.on_lost
            )
        )
        if self._experts is not None:
            self._experts.watch(self._loop.wake, self._loop.step_waits)

    def _fill_status(self, status: ClusterStatus) -> None:
        spec = self._source.spec
        status.ready = True
        status.model, status.kind = self._config.model_id, spec.model_type
        status.context_tokens = self._engine.limits.max_model_len
        status.vocab_size = spec.vocab_size
        status.decoder.CopyFrom(
            Part(
                pid=os.getpid(),
                device=str(self._source.device),
                metrics_port=self._metrics_port,
                kernels=self._source.kernels,
            )
        )
        if spec.is_moe:
            groups = expert_groups(self._config, spec)
            status.experts = (
                f"{spec.num_experts} experts, top {spec.top_k_experts}, in {groups.num_groups} "
                "groups"
            )
            if self._expert_load is not None:
                status.group_load.extend(to_group_load(self._expert_load, groups))
        if self._experts is not None:
            self._experts.fill_status(status)
        if self._store is not None:
            status.kv_store.CopyFrom(to_kv_store(self._store.status))
