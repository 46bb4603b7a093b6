"""Expert hosts in processes of their own, for tests that kill, stop or slow them."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from cluster.checkpoint import Checkpoint
from cluster.links.connect import Endpoint
from cluster.placement import ExpertGroups, ExpertPlacement
from cluster.spec import ModelSpec
from experts.host import ExpertHost
from experts.host_process import serve_host
from experts.router import ExpertRouter
from tests.support.experts.tiny_experts import NUM_EXPERTS, tiny_spec

SPEC = tiny_spec()
GROUPS = ExpertGroups(NUM_EXPERTS, 4)
HOSTS = ["a", "b"]
ONE_COPY = ExpertPlacement.spread(GROUPS, HOSTS)
TWO_COPIES = ExpertPlacement.spread(GROUPS, HOSTS, num_copies=2)
SECRET = b"between us"


class SlowHost(ExpertHost):
    """Computes for at least `compute_s`."""

    def __init__(self, *args: Any, compute_s: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._least_s = compute_s

    def answer(self, frame: memoryview) -> list[memoryview]:
        time.sleep(self._least_s)
        return super().answer(frame)


class Swarm:
    """Host processes and what a router needs to reach them."""

    def __init__(
        self,
        model_dir: Path,
        placement: ExpertPlacement,
        make: type[ExpertHost] = ExpertHost,
        **options: Any,
    ) -> None:
        self.placement, self.model_dir = placement, model_dir
        self.processes: dict[str, BaseProcess] = {}
        self.endpoints: dict[str, Endpoint] = {}
        self._controls: list[Any] = []
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["experts.host"])  # torch is imported once, not per host
        options = {"batch_invariant": True, "num_threads": 1, **options}
        for host_id in placement.host_ids:
            control, far = context.Pipe()
            process = context.Process(
                target=serve_host,
                args=(make, far, host_id, model_dir, placement, SECRET),
                kwargs=options,
                daemon=True,
            )
            process.start()
            far.close()
            self.processes[host_id] = process
            self._controls.append(control)
        for host_id, control in zip(placement.host_ids, self._controls, strict=True):
            assert control.poll(60)
            self.endpoints[host_id] = Endpoint.from_dict(control.recv())

    def router(self, **options: Any) -> ExpertRouter:
        spec, weights_hash = (
            ModelSpec.load(self.model_dir),
            Checkpoint(self.model_dir).fingerprint,
        )
        keys: dict[str, Any] = {"secret": SECRET, "weights_hash": weights_hash, "timeout_s": 5.0}
        return ExpertRouter(spec, self.placement, self.endpoints, **{**keys, **options})

    def signal(self, host_id: str, number: int) -> None:
        pid = self.processes[host_id].pid
        assert pid is not None
        os.kill(pid, number)

    def close(self) -> None:
        for control in self._controls:
            control.close()
        for process in self.processes.values():
            process.kill()
            process.join()
