"""The start of a decoder: model, experts, store, engine and step loop, in this order."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cluster.config import Config
from cluster.links.connect import Endpoint, Listener
from cluster.metrics import Metrics, part_registry, start_metrics_server
from cluster.placement import ExpertPlacement
from deployments.decoder.host_directory import HostDirectory
from deployments.decoder.kv.block_store import KVBlockStore, kv_tensors
from deployments.decoder.link import GatewayLinks, verify_gateway
from deployments.decoder.meters import EngineMeter, ExpertMeter
from deployments.decoder.remote_experts import RemoteExperts
from deployments.decoder.status import DecoderStatus
from deployments.decoder.step_loop import StepLoop
from deployments.layout import decoder_threads, expert_groups, transports
from deployments.loading import (
    LoadedModel,
    ModelSource,
    OnProgress,
    fingerprint,
    load_local_experts,
    load_model,
    make_engine,
    warm_up,
)
from deployments.process.serve_handles import Handle
from deployments.redis_store import TenantBudgets, open_kv_store, store_address
from engine.prefill_meter import PrefillMeter
from experts.local import LocalExperts
from experts.stats import ExpertLoad
from protos.briolette.v1.admin_pb2 import ClusterStatus, Part

FLUSH_S = 3.0  # at the end, for values that wait to be written to the store


@dataclass(frozen=True, slots=True)
class Decoder:
    """A decoder that serves, until it is closed."""

    loop: StepLoop
    endpoint: Endpoint  # where gateways link to
    store: KVBlockStore | None
    remote_experts: RemoteExperts | None

    def close(self) -> None:
        """Stop after the step that runs, and write to the store what waits for it."""
        self.loop.close()
        if self.store is not None:
            self.store.flush(FLUSH_S)
            self.store.close()
        if self.remote_experts is not None:
            self.remote_experts.close()


def start_decoder(
    *,
    config: Config,
    placement: ExpertPlacement | None,
    hosts: Mapping[str, Handle],
    secret: bytes,
    on_progress: OnProgress,
) -> Decoder:
    """Load the model, produce a token, and accept gateways.

    Args:
        config: The configuration of the cluster.
        placement: Which host holds which experts; None computes all of them in this process.
        hosts: The Serve handle of every host of the placement, by host id.
        secret: The cluster's, for the handshake of links.
        on_progress: Called with (num_done, num_total) while weights are read.

    Raises:
        BrioletteError: With the reason, when the decoder can't serve.
    """
    source = ModelSource.open(config)
    registry = part_registry()
    metrics = Metrics(registry)
    torch.set_num_threads(decoder_threads(config, len(hosts)))

    remote, local = None, None
    if placement is None:
        local = load_local_experts(config, source, on_progress)
    else:
        meter = ExpertMeter(metrics, config.model_id)
        remote = RemoteExperts(
            config=config,
            source=source,
            placement=placement,
            directory=HostDirectory(hosts),
            secret=secret,
            meter=meter,
        )
    model = load_model(config, source, remote.router if remote else local, on_progress)
    prefill_meter, budgets = PrefillMeter(), TenantBudgets(config.store.tenant_bytes)
    store = connect_store(config, source, model, metrics, budgets, prefill_meter)
    engine = make_engine(config, source, model, store=store, prefill_meter=prefill_meter)
    if remote is not None:
        remote.wait_ready(config.ray.start_timeout_s)
    warm_up(engine)
    gc.collect()
    gc.freeze()  # else each full collection holds up a step for as long as 0.1 s

    metrics_port = start_metrics_server(config.gateway.metrics_host, 0, registry).port
    status = DecoderStatus(
        constant=constant_status(config, source, model, metrics_port),
        groups=expert_groups(config, source.spec),
        expert_load=remote.router.load if remote else counted_load(local, source),
        remote_experts=remote,
        store=store,
    )
    loop = StepLoop(
        engine=engine,
        meter=EngineMeter(metrics, config.model_id),
        fill_status=status.fill,
        store=store,
        on_budget=budgets.set,
    )
    listener = Listener(secret, verify_gateway, transports=transports(config))
    loop.start(GatewayLinks(listener, loop.greeting, loop.on_message, loop.on_lost))
    if remote is not None:
        remote.watch(loop.wake, loop.step_waits)
    return Decoder(loop, listener.endpoint, store, remote)


def connect_store(
    config: Config,
    source: ModelSource,
    model: LoadedModel,
    metrics: Metrics,
    budgets: TenantBudgets,
    prefill_meter: PrefillMeter,
) -> KVBlockStore | None:
    """Open the Redis tier of the model's KV blocks; None where the configuration has none."""
    if (address := store_address(config)) is None:
        return None
    return KVBlockStore(
        kv_tensors(model.runner),
        config.engine.block_size,
        source.spec.sliding_window,
        fingerprint(config, source),
        lambda whole: open_kv_store(config, address, whole, metrics, budgets.get),
        prefill_meter.seconds,
    )


def counted_load(local: LocalExperts | None, source: ModelSource) -> ExpertLoad | None:
    """Return the load of local experts; None on a GPU, where counting would make it wait."""
    return local.load if local is not None and source.device.type == "cpu" else None


def constant_status(
    config: Config, source: ModelSource, model: LoadedModel, metrics_port: int
) -> ClusterStatus:
    """Return the part of the status that never changes: the model and this process."""
    spec, experts = source.spec, ""
    if spec.is_moe:
        num_groups = expert_groups(config, spec).num_groups
        experts = f"{spec.num_experts} experts, top {spec.top_k_experts}, in {num_groups} groups"
    return ClusterStatus(
        ready=True,
        model=config.model_id,
        kind=spec.model_type,
        context_tokens=model.limits.max_model_len,
        vocab_size=spec.vocab_size,
        experts=experts,
        decoder=Part(
            pid=os.getpid(),
            device=str(source.device),
            metrics_port=metrics_port,
            kernels=source.kernels,
        ),
    )
