"""A decoder's side of two expert hosts that run in this process, without Ray Serve."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from cluster.config import Config
from cluster.metrics import Metrics
from deployments.decoder.host_directory import HostDirectory
from deployments.decoder.meters import ExpertMeter
from deployments.decoder.remote_experts import RemoteExperts
from deployments.layout import place_experts
from deployments.loading import ModelSource
from experts.host import ExpertHost
from protos.briolette.v1.admin_pb2 import ClusterStatus
from tests.support.experts.tiny_experts import random_topk

SECRET = b"between us"


class Handle:
    """Stands for Serve's handle of a host; no replica answers before `host` is set."""

    host: ExpertHost | None = None

    def broadcast(self, method: str) -> Handle:
        assert method == "describe"
        return self

    def results(self, **_: Any) -> list[Any]:
        if self.host is None:
            return [RuntimeError("no replica")]
        return [
            {
                "host_id": self.host.host_id,
                "pid": os.getpid(),
                "device": "cpu",
                "kernels": "native",
                "visible_devices": "",
                "metrics_port": 1,
                "group_ids": [0, 1],
                "endpoint": self.host.endpoint.to_dict(),
            }
        ]


class HostedExperts:
    """The handles of two hosts, the hosts that were started, and the decoder's side of them."""

    def __init__(self, model_dir: Path, **experts: Any) -> None:
        self.config = Config.load(None, {"model": str(model_dir), "experts": experts})
        self.source = ModelSource.open(self.config)
        placement = place_experts(self.config, self.source.spec)
        assert placement is not None
        self.placement = placement
        self.handles = {host_id: Handle() for host_id in placement.host_ids}
        self.registry = CollectorRegistry()
        meter = ExpertMeter(Metrics(self.registry), "m")
        directory = HostDirectory(self.handles)
        self.experts = RemoteExperts(
            config=self.config,
            source=self.source,
            placement=placement,
            directory=directory,
            secret=SECRET,
            meter=meter,
        )

    def start(self, host_id: str) -> ExpertHost:
        source = self.source
        host = ExpertHost(
            host_id,
            source.spec,
            source.checkpoint,
            self.placement,
            dtype=source.dtype,
            device="cpu",
            secret=SECRET,
        )
        host.start()
        self.handles[host_id].host = host
        return host

    def status(self) -> ClusterStatus:
        status = ClusterStatus(ready=True)
        self.experts.fill_status(status)
        return status

    def call(self) -> torch.Tensor:
        router = self.experts.router
        return router.combine(router.dispatch(0, *random_topk(self.source.spec, 20)))

    def close(self) -> None:
        self.experts.close()
        for handle in self.handles.values():
            if handle.host is not None:
                handle.host.close()


@contextlib.contextmanager
def hosted_experts(model_dir: Path, **experts: Any) -> Iterator[HostedExperts]:
    """Run with the given keys of `experts` in the configuration."""
    with contextlib.closing(HostedExperts(model_dir, **experts)) as made:
        yield made
