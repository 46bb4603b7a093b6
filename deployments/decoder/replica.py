"""The decoder in a Serve replica: its start, its health, and where gateways link to."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from cluster.config import Config
from cluster.errors import Unavailable
from cluster.placement import ExpertPlacement
from deployments.decoder.start import Decoder, start_decoder
from deployments.process.priority import go_first
from deployments.process.report import reporting
from deployments.process.serve_handles import Handle


class DecoderReplica:
    """The decoder's Serve deployment: it has produced a token when the constructor returns."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        settings: Mapping[str, Any],
        placement: ExpertPlacement | None,
        secret: bytes,
        *hosts: Handle,
    ) -> None:
        """Start the decoder in a thread: Serve answers handles and health checks on the loop.

        Args:
            settings: the configuration in plain values.
            placement: the experts of each host; None if the decoder computes them.
            secret: the cluster's, for the handshake of links.
            hosts: Serve handles in the order of `placement.host_ids`.
        """
        config = Config.from_dict(settings)
        host_ids = placement.host_ids if placement else []
        by_id = dict(zip(host_ids, hosts, strict=True))
        self._decoder = await asyncio.to_thread(_start, config, placement, by_id, secret)

    def endpoint(self) -> dict[str, Any]:
        """Return where gateways link to, in plain values."""
        return self._decoder.endpoint.to_dict()

    def check_health(self) -> None:
        """Raise Unavailable with the reason when Serve should replace the replica."""
        if (problem := self._decoder.loop.problem()) is not None:
            raise Unavailable(problem)

    def __del__(self) -> None:
        if hasattr(self, "_decoder"):
            self._decoder.close()


def _start(
    config: Config, placement: ExpertPlacement | None, hosts: Mapping[str, Handle], secret: bytes
) -> Decoder:
    go_first()
    with reporting(config.state_dir, "decoder") as reporter:
        return start_decoder(
            config=config,
            placement=placement,
            hosts=hosts,
            secret=secret,
            on_progress=reporter.progress,
        )
