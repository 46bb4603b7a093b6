"""Where Prometheus finds every part: a file for its file_sd, rewritten when a part moves."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.files import write_atomic
from protos.briolette.v1.admin_pb2 import ClusterStatus, Part

FILE = "prometheus_targets.json"


class ScrapeTargets:
    """Keeps the file in step with the status: all ports but the gateway's are free ones."""

    def __init__(self, state_dir: Path, host: str) -> None:
        """`host` is where every part shows its /metrics."""
        self._path = state_dir / FILE
        self._host = f"[{host}]" if ":" in host else host
        self._written = ""

    def update(self, status: ClusterStatus) -> None:
        """Called for every status; writes only what is new."""
        parts = [("gateway", status.gateway), ("decoder", status.decoder)]
        parts += [(host.host_id, host.part) for host in status.expert_hosts]
        text = json.dumps([self._group(name, part) for name, part in parts if part.metrics_port])
        if text != self._written:
            write_atomic(self._path, text)  # Prometheus never reads half a file
            self._written = text

    def _group(self, name: str, part: Part) -> dict[str, object]:
        return {"targets": [f"{self._host}:{part.metrics_port}"], "labels": {"part": name}}
