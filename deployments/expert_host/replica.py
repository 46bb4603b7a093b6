"""An expert host in a Serve replica: start, health, and where it can be reached."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from cluster.config import Config
from cluster.errors import Unavailable
from cluster.metrics import start_metrics_server
from deployments.expert_host.meter import HostMeter
from deployments.layout import host_threads, place_experts, transports
from deployments.loading import Source
from deployments.process.priority import go_first
from deployments.process.report import reporting
from experts.host import ExpertHost


class ExpertHostReplica:
    """One host slot: a process of its own with the groups that the placement gives to `host_id`.

    Ray keeps exactly one alive and gives it its card; the data plane goes past Ray.
    """

    def __init__(self, settings: Mapping[str, Any], host_id: str, secret: bytes) -> None:
        config = Config.from_dict(settings)
        go_first()
        with reporting(config.state_dir, host_id) as reporter:
            source = Source.open(config)
            placement = place_experts(config, source.spec)
            assert placement is not None
            self._groups = placement.groups_of(host_id)
            self._host = ExpertHost(
                host_id,
                source.spec,
                source.checkpoint,
                placement,
                source.dtype,
                source.device,
                secret,
                config.batch_invariant,
                transports=transports(config),
                num_threads=host_threads(config, len(placement.host_ids)),
                on_progress=reporter.progress,
            )
            self._endpoint = self._host.start()
            self._device, self._kernels = str(source.device), source.kernels
            self._meter = HostMeter(self._host, placement.groups, config.model_id)
            self._metrics = start_metrics_server(
                config.gateway.metrics_host, 0, self._meter.registry
            )

    def describe(self) -> dict[str, Any]:
        """Who and where this is, in plain values; see `deployments.decoder.host_directory`."""
        return {
            "host_id": self._host.host_id,
            "pid": os.getpid(),
            "device": self._device,
            "kernels": self._kernels,
            "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            "metrics_port": self._metrics.port,
            "group_ids": list(self._groups),
            "endpoint": self._endpoint.to_dict(),
        }

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if (problem := self._host.problem()) is not None:
            raise Unavailable(problem)

    def __del__(self) -> None:
        if hasattr(self, "_host"):
            self._host.close()
