"""Expert hosts in threads of this process and a router to them: remote experts for a test."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cluster.checkpoint import Checkpoint
from cluster.placement import ExpertGroups, ExpertPlacement
from cluster.spec import ModelSpec
from experts.host import ExpertHost
from experts.router import DispatchHandle, ExpertRouter

SECRET = b"between threads"


class LosesHost(ExpertRouter):
    """Closes a host right after a layer's dispatch to it, once: its answer may be lost or not."""

    doomed: tuple[int, ExpertHost] | None = None  # at which layer, whom

    def dispatch(
        self, layer_idx: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> DispatchHandle:
        handle = super().dispatch(layer_idx, hidden_states, topk_ids, topk_weights)
        if self.doomed is not None and self.doomed[0] == layer_idx:
            self.doomed[1].close()
            self.doomed = None
        return handle


@contextlib.contextmanager
def remote_experts(
    model_dir: Path, groups: ExpertGroups, *, num_copies: int = 1, batch_invariant: bool = False
) -> Iterator[tuple[LosesHost, list[ExpertHost]]]:
    """A router, linked to two hosts in fp32, and the hosts."""
    spec, checkpoint = ModelSpec.load(model_dir), Checkpoint(model_dir)
    placement = ExpertPlacement.spread(groups, ["a", "b"], num_copies=num_copies)
    with contextlib.ExitStack() as stack:
        hosts = [
            stack.enter_context(
                ExpertHost(
                    host_id,
                    spec,
                    checkpoint,
                    placement,
                    dtype=torch.float32,
                    device="cpu",
                    secret=SECRET,
                    batch_invariant=batch_invariant,
                )
            )
            for host_id in placement.host_ids
        ]
        endpoints = {host.host_id: host.endpoint for host in hosts}
        router = LosesHost(
            spec,
            placement,
            endpoints,
            secret=SECRET,
            weights_hash=checkpoint.fingerprint,
            timeout_s=30.0,
        )
        stack.enter_context(router)
        router.wait_ready(10)
        yield router, hosts
