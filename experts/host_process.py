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
    """Run a host in a process that `multiprocessing` spawned.

    Sends `Endpoint.to_dict()` on `control`, then serves until the other end of it closes.

    Args:
        make: ExpertHost, or a subclass that misbehaves.
        control: a pipe to the process that spawned this one.
        host_id: this host's name in the placement.
        model_dir: of the checkpoint.
        placement: which hosts hold which groups.
        secret: of the cluster.
        dtype: of the weights.
        device: that computes.
        batch_invariant: whether a row's bits mustn't depend on the batch.
        options: keyword arguments of `make` beside these.
    """
    spec, checkpoint = ModelSpec.load(model_dir), Checkpoint(model_dir)
    host = make(
        host_id,
        spec,
        checkpoint,
        placement,
        dtype=dtype,
        device=device,
        secret=secret,
        batch_invariant=batch_invariant,
        **options,
    )
    with host:
        control.send(host.endpoint.to_dict())
        with contextlib.suppress(EOFError):
            control.recv()
