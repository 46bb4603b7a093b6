"""An expert host in a Serve replica: start, health, and where it can be reached."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from cluster.config import Config
from cluster.errors import Unavailable
from cluster.metrics import start_metrics_server
from cluster.placement import ExpertPlacement
from deployments.expert_host.meter import HostMeter
from deployments.layout import host_threads, transports
from deployments.loading import ModelSource
from deployments.process.priority import go_first
from deployments.process.report import reporting
from experts.host import ExpertHost


class ExpertHostReplica:
    """The Serve deployment of one expert host: a process with the groups that are placed on it.

    Ray keeps exactly one alive and gives it its GPU; expert calls don't pass through Ray.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        placement: ExpertPlacement,
        host_id: str,
        secret: bytes,
    ) -> None:
        """Load the experts of `host_id` and listen.

        Args:
            settings: the configuration in plain values.
            placement: the experts of each host.
            host_id: this host in the placement.
            secret: the cluster's, for the handshake of links.
        """
        config = Config.from_dict(settings)
        go_first()
        with reporting(config.state_dir, host_id) as reporter:
            source = ModelSource.open(config)
            self._groups = placement.groups_of(host_id)
            self._host = ExpertHost(
                host_id,
                source.spec,
                source.checkpoint,
                placement,
                dtype=source.dtype,
                device=source.device,
                secret=secret,
                batch_invariant=config.batch_invariant,
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
        """Return the fields of `deployments.decoder.host_directory.HostInfo`, in plain values."""
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
        """Raise Unavailable with the reason when Serve should replace the replica."""
        if (problem := self._host.problem()) is not None:
            raise Unavailable(problem)

    def __del__(self) -> None:
        if hasattr(self, "_host"):
            self._host.close()
