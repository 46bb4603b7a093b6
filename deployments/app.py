"""The application: the Serve deployments of a cluster, their arguments and their resources."""

from __future__ import annotations

from typing import Any

from ray import serve

from cluster.config import Config
from cluster.spec import ModelSpec
from deployments.decoder.replica import DecoderReplica
from deployments.expert_host.replica import ExpertHostReplica
from deployments.gateway.replica import GatewayReplica
from deployments.layout import decoder_gpus, host_gpus, place_experts

HEALTH = {"health_check_period_s": 1.0, "health_check_timeout_s": 5.0}


def build(config: Config, spec: ModelSpec, secret: bytes, num_gpus: float = 0.0) -> Any:
    """Bind the Serve application: a gateway, a decoder and a deployment for each expert host.

    Args:
        config: The configuration of the cluster.
        spec: The model, by which the experts are placed.
        secret: Known to these processes only; links prove it in their handshake.
        num_gpus: The GPUs that Ray has; the parts share them unless the configuration says how.
    """
    settings = config.to_dict()
    placement = place_experts(config, spec)
    host_ids = placement.host_ids if placement else []
    hosts = [
        serve.deployment(
            ExpertHostReplica,
            name=f"experts_{host_id}",
            max_ongoing_requests=100,
            max_constructor_retry_count=3,
            graceful_shutdown_timeout_s=2.0,
            ray_actor_options=resources(host_gpus(config, num_gpus, len(host_ids))),
            **HEALTH,
        ).bind(settings, placement, host_id, secret)
        for host_id in host_ids
    ]
    decoder = serve.deployment(
        DecoderReplica,
        name="decoder",
        max_ongoing_requests=100,
        max_constructor_retry_count=3,
        graceful_shutdown_timeout_s=5.0,
        ray_actor_options=resources(decoder_gpus(config, num_gpus, len(host_ids))),
        **HEALTH,
    ).bind(settings, placement, secret, *hosts)
    return serve.deployment(
        GatewayReplica,
        name="gateway",
        max_constructor_retry_count=3,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=15.0,
        ray_actor_options=resources(0),
        **HEALTH,
    ).bind(settings, secret, decoder)


def resources(num_gpus: float) -> dict[str, float]:
    """Return a part's `ray_actor_options`. Cores are shared by threads: Ray counts whole ones."""
    return {"num_cpus": 0, "num_gpus": num_gpus}
