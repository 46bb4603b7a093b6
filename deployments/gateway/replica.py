"""The gateway in a Serve replica: finds its files, its ports and the decoder."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry

from cluster.checkpoint import resolve_model
from cluster.config import Config, GatewayConfig
from cluster.errors import LinkError, Unavailable
from cluster.links.connect import Endpoint
from cluster.metrics import Metrics, part_registry, start_metrics_server
from cluster.tenants.admission import Admission
from cluster.tenants.sessions import Sessions
from cluster.tenants.usage import UsageBooks
from deployments.gateway.admission import open_admission
from deployments.gateway.gateway import Gateway, GatewayParts, bind
from deployments.gateway.scrape_targets import ScrapeTargets
from deployments.process.local_access import local_socket
from deployments.process.report import reporting
from deployments.process.serve_handles import Handle, ask_replicas
from deployments.redis_store import store_address
from engine.text.tokenizer import Tokenizer

BIND_TIMEOUT_S = 10.0  # a gateway that is being replaced may still hold the port


class GatewayReplica:
    """A gateway in a Serve replica, on the replica's own asyncio loop."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Mapping[str, Any], secret: bytes, decoder: Handle
    ) -> None:
        config = Config.from_dict(settings)
        with reporting(config.state_dir, "gateway") as reporter:
            model_dir = resolve_model(config.model_source)
            tokenizer = await asyncio.to_thread(Tokenizer.load, model_dir)
            registry = part_registry()
            admission = await asyncio.to_thread(open_admission, config)
            parts = GatewayParts(
                tokenizer=tokenizer,
                find_decoder=lambda: find_decoder(decoder),
                secret=secret,
                metrics=Metrics(registry),
                metrics_port=await bind(
                    lambda: serve_metrics(config.gateway, registry), BIND_TIMEOUT_S
                ),
                admission=admission,
                sessions=kept_sessions(config, admission),
                usage_books=UsageBooks(store_address(config)),
                log_dir=config.state_dir / "logs",
                local_socket=local_socket(config),
                on_status=ScrapeTargets(config.state_dir, config.gateway.metrics_host).update,
            )
            gateway = Gateway(config.gateway, parts, bind_timeout_s=BIND_TIMEOUT_S)
            gc.collect()
            gc.freeze()  # else each full collection holds up every stream
            await gateway.start()
            self._gateway = gateway
            reporter.listening(f"{config.gateway.host}:{gateway.port}", gateway.base_url)

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if (problem := self._gateway.problem()) is not None:
            raise Unavailable(problem)

    async def __del__(self) -> None:
        if hasattr(self, "_gateway"):
            await self._gateway.stop()


def kept_sessions(config: Config, admission: Admission) -> Sessions | None:
    """Where sessions are kept, if there is a store."""
    address = store_address(config)
    if address is None:
        return None
    tenants = admission.tenants
    if tenants is None:
        return Sessions(address, config.store.ttl_s, lambda tenant: config.store.tenant_bytes)

    def budget_of(tenant: str) -> int:
        return tenants.kv_bytes(tenant) or config.store.tenant_bytes

    return Sessions(address, config.store.ttl_s, budget_of, tenants.refresh)


def serve_metrics(config: GatewayConfig, registry: CollectorRegistry) -> int:
    """The port of /metrics; 0 where the configuration wants none."""
    if config.metrics_port is None:
        return 0
    return start_metrics_server(config.metrics_host, config.metrics_port, registry).port


def find_decoder(decoder: Handle) -> Endpoint:
    """Ask Serve where the decoder is. Raises LinkError."""
    for answer in ask_replicas(decoder, "endpoint"):
        return Endpoint.from_dict(answer)
    raise LinkError("The decoder doesn't answer.")
