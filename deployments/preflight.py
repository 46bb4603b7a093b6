"""What can be known to fail before any process is started: the model, the ports, the memory."""

from __future__ import annotations

import math
import socket
from pathlib import Path

import psutil

from cluster.config import Config
from cluster.errors import ConfigError, NotEnoughMemory, PortTaken
from cluster.spec import ModelSpec

PROCESS_BYTES = 350 << 20  # of a Python process with torch loaded


def check(config: Config) -> ModelSpec:
    """The model's geometry. Raises the error that the start would end in, seconds earlier."""
    from cluster.checkpoint import resolve_model  # brings torch along

    check_port(config.gateway.host, config.gateway.port, "gateway.port")
    check_port(config.gateway.host, config.gateway.metrics_port or 0, "gateway.metrics_port")
    model_dir = resolve_model(config.model_source)
    spec = ModelSpec.load(model_dir)
    if (
        spec.is_moe
        and config.experts.mode == "remote"
        and spec.num_experts < config.experts.num_hosts
    ):
        raise ConfigError(
            f"experts.num_hosts is {config.experts.num_hosts}, but the model has only "
            f"{spec.num_experts} experts in a layer."
        )
    check_memory(config, spec, model_dir)
    return spec


def check_port(host: str, port: int, key: str) -> None:
    """Raises PortTaken, or ConfigError where only root may listen."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            raise ConfigError(f"{key} {port} needs privileges; choose one above 1023.") from None
        except OSError:
            raise PortTaken(
                f"Another process listens on {host}:{port}; choose another {key} "
                "(0 takes a free one)."
            ) from None


def check_memory(config: Config, spec: ModelSpec, model_dir: Path) -> None:
    """Raises NotEnoughMemory when what the CPU computes can't fit in what is free."""
    import torch

    from cluster.checkpoint import Checkpoint

    checkpoint = Checkpoint(model_dir)
    names = checkpoint.keys()
    sizes = {
        name: math.prod(checkpoint.shape(name))
        for name in names
        if name.startswith(spec.tensor_prefix)
    }
    num_expert_weights = sum(size for name, size in sizes.items() if ".experts." in name)
    itemsize = 4 if config.dtype in ("auto", "float32") else 2
    is_remote = spec.is_moe and config.experts.mode == "remote"
    is_on_cpu = config.device == "cpu" or config.ray.num_gpus == 0 or not torch.cuda.is_available()
    needed = (3 + (config.experts.num_hosts if is_remote else 0)) * PROCESS_BYTES
    if is_on_cpu:
        needed += (sum(sizes.values()) - num_expert_weights) * itemsize + config.engine.kv_bytes
    if is_on_cpu or (is_remote and config.experts.num_gpus_per_host == 0):
        copies = config.experts.num_copies if is_remote else 1
        needed += num_expert_weights * itemsize * copies
    free = psutil.virtual_memory().available
    if needed > free:
        raise NotEnoughMemory(
            f"The model and its KV cache need about {needed / 1e9:.1f} GB of memory and "
            f"{free / 1e9:.1f} GB are free; lower engine.kv_bytes or choose a smaller model."
        )
