"""An expert host as a process of its own, for tests and benches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from cluster.checkpoint import Checkpoint
from cluster.placement import ExpertPlacement
from cluster.spec import ModelSpec
from experts.host import ExpertHost


def serve_host(
    make: Callable[..., ExpertHost],
    control: Connection,
    host_id: str,
    model_dir: Path,
    placement: ExpertPlacement,
    secret: bytes,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    batch_invariant: bool = False,
    **options: Any,
) -> None:
    """Run a host: what `multiprocessing` spawns.

    Sends `Endpoint.to_dict()` on `control`, then serves until the other end of it closes. `make` is
    ExpertHost or a subclass that misbehaves, `options` are its own.
    """
    spec, checkpoint = ModelSpec.load(model_dir), Checkpoint(model_dir)
    host = make(
        host_id, spec, checkpoint, placement, dtype, device, secret, batch_invariant, **options
    )
    with host:
        control.send(host.endpoint.to_dict())
        with contextlib.suppress(EOFError):
            control.recv()
