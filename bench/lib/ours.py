"""Briolette as a system under test: the engine in this process, and the whole cluster."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from bench.lib.drive import drive
from bench.lib.models import BenchModel
from bench.lib.peers import NotMeasured
from bench.lib.timing import Timing
from cluster.config import Config
from cluster.errors import BrioletteError


class InProcess:
    """EngineCore with local experts: nothing of the cluster stands on the path."""

    def __init__(
        self, model: BenchModel, num_threads: int, *, batch_invariant: bool = False
    ) -> None:
        from deployments.loading import ModelSource, load_engine, load_local_experts

        torch.set_num_threads(num_threads)
        self.name = "in-process, invariant" if batch_invariant else "in-process"
        config = bench_config(model, {"experts.mode": "local", "batch_invariant": batch_invariant})
        source = ModelSource.open(config)
        self._engine = load_engine(config, source, load_local_experts(config, source))

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Timing:
        return drive(self._engine, prompts, num_tokens)

    def close(self) -> None:
        del self._engine


class Cluster:
    """Everything: gRPC client, gateway, decoder and two expert hosts, each a process under Ray."""

    name = "whole cluster"

    def __init__(self, model: BenchModel, overrides: dict[str, Any] | None = None) -> None:
        """Raises NotMeasured when the cluster doesn't come up."""
        from deployments.start import lifecycle

        self.state_dir = Path(tempfile.mkdtemp(prefix="briolette-bench-"))
        self._config = bench_config(
            model,
            {
                "experts.mode": "remote",
                "experts.num_hosts": 2,
                "state_dir": str(self.state_dir),
                "gateway.port": 0,
                "gateway.http_port": None,
                "gateway.metrics_port": 0,
                "ray.start_timeout_s": 240.0,
                **(overrides or {}),
            },
        )
        try:
            self.running = lifecycle.start(self._config, lambda news: None)
        except BrioletteError as error:
            shutil.rmtree(self.state_dir, ignore_errors=True)
            raise NotMeasured(f"The cluster did not start: {error}") from None
        import grpc

        from protos.briolette.v1.inference_pb2_grpc import InferenceStub

        self._channel = grpc.insecure_channel(str(self.running.address))
        self._stub = InferenceStub(self._channel)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Timing:
        """One thread and one streaming call for each prompt, as that many clients would."""
        from protos.briolette.v1.inference_pb2 import CompleteRequest, Sampling, TokenIds

        sampling = Sampling(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        token_times: list[list[float]] = [[] for _ in prompts]
        errors: list[Exception] = []

        def ask(stream: int) -> None:
            ids = TokenIds(ids=prompts[stream])
            try:
                for piece in self._stub.Complete(
                    CompleteRequest(token_ids=ids, sampling=sampling), timeout=300.0
                ):
                    now = time.perf_counter() - started
                    token_times[stream] += [now] * len(piece.token_ids)
            except Exception as error:  # an RPC's border; told below, in the calling thread
                errors.append(error)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise RuntimeError(f"The cluster failed a request: {errors[0]}")
        assert all(len(times) == num_tokens for times in token_times), "a stream ended early"
        return Timing(token_times)

    def close(self) -> None:
        from deployments.start import lifecycle

        self._channel.close()
        lifecycle.stop(self.state_dir)
        shutil.rmtree(self.state_dir, ignore_errors=True)


def bench_config(model: BenchModel, overrides: dict[str, Any]) -> Config:
    """The configuration of every system of ours: fp32 on the CPU, room for all streams at once."""
    return Config.load(
        None,
        {
            "model": str(model.model_dir),
            "dtype": "float32",
            "device": "cpu",
            "engine.max_num_seqs": 32,
            "engine.max_model_len": 512,
            "engine.kv_bytes": 256 << 20,
            **overrides,
        },
    )
