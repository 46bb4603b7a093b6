"""Checks before any process is started: the model, the ports, the files, the memory."""

from __future__ import annotations

import errno
import math
import socket
from pathlib import Path

import psutil

from cluster.config import Config
from cluster.errors import ConfigError, NotEnoughMemory, PortTaken
from cluster.spec import ModelSpec
from deployments.gateway.tls import server_context
from deployments.process.local_access import local_socket

PROCESS_BYTES = 350 << 20  # memory of a Python process with torch loaded
NUM_PROCESSES = 3  # gateway, decoder, and all of Ray's counted as one


def check(config: Config) -> ModelSpec:
    """Check a configuration against this machine, and return the geometry of its model.

    Raises:
        BrioletteError: The start would fail with this error, after several seconds.
    """
    from cluster.checkpoint import resolve_model  # late: it imports torch, which takes seconds

    gateway = config.gateway
    check_port(gateway.host, gateway.port, "gateway.port")
    check_port(gateway.host, gateway.http_port or 0, "gateway.http_port")
    check_port(gateway.metrics_host, gateway.metrics_port or 0, "gateway.metrics_port")
    server_context(gateway)
    local_socket(config)
    model_dir = resolve_model(config.model_source)
    spec = ModelSpec.load(model_dir)
    if (
        spec.is_moe
        and config.experts.mode == "remote"
        and spec.num_experts < config.experts.num_hosts
    ):
        raise ConfigError(
            f"experts.num_hosts is {config.experts.num_hosts}, but the model has only "
            f"{spec.num_experts} experts per layer; lower it."
        )
    check_memory(config, spec, model_dir)
    return spec


def check_port(host: str, port: int, key: str) -> None:
    """Check that this process may listen on an address.

    Args:
        host: Name or address to listen on.
        port: 0 for a free one.
        key: The configuration's key of the port, for the error.

    Raises:
        PortTaken: Another process listens there.
        ConfigError: The host isn't this machine, or the port needs privileges.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            raise ConfigError(f"{key} {port} needs root; choose a port above 1023.") from None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # gaierror, for an unknown name, has other numbers
                raise ConfigError(
                    f"{key} can't listen on {host}: {error.strerror or error}."
                ) from None
            raise PortTaken(
                f"Another process listens on {host}:{port}; choose another {key} "
                "(0 takes a free one)."
            ) from None


def check_memory(config: Config, spec: ModelSpec, model_dir: Path) -> None:
    """Raise NotEnoughMemory if weights and KV cache don't fit in the machine's free memory."""
    needed = memory_needed(config, spec, model_dir)
    total, free = sum(needed.values()), psutil.virtual_memory().available
    if total > free:
        parts = ", ".join(f"{size / 1e9:.1f} GB for {part}" for part, size in needed.items())
        raise NotEnoughMemory(
            f"The model needs about {total / 1e9:.1f} GB of memory ({parts}), but only "
            f"{free / 1e9:.1f} GB are free; lower engine.kv_bytes or experts.num_copies, or choose "
            "a smaller model."
        )


def memory_needed(config: Config, spec: ModelSpec, model_dir: Path) -> dict[str, int]:
    """Return the bytes of the machine's own memory by use; GPU memory is not counted."""
    import torch  # late: the import takes seconds

    from cluster.checkpoint import Checkpoint
    from engine.model.weights import decoder_bytes

    checkpoint = Checkpoint(model_dir)
    is_on_cpu = config.device == "cpu" or config.ray.num_gpus == 0 or not torch.cuda.is_available()
    is_remote = spec.is_moe and config.experts.mode == "remote"
    are_experts_on_cpu = is_on_cpu or (is_remote and config.experts.num_gpus_per_host == 0)
    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    num_processes = NUM_PROCESSES + (config.experts.num_hosts if is_remote else 0)
    needed = {"processes": num_processes * PROCESS_BYTES}
    if is_on_cpu:
        needed["attention"] = decoder_bytes(spec, checkpoint, dtype)
        if spec.tie_word_embeddings and dtype is torch.float32:
            # The embedding table, and a copy in a layout in which logits are computed faster.
            needed["attention"] += spec.vocab_size * spec.hidden_size * dtype.itemsize
        needed["the KV cache"] = config.engine.kv_bytes
    if spec.is_moe and are_experts_on_cpu:
        num_copies = config.experts.num_copies if is_remote else 1
        names = [name for name in checkpoint.keys() if ".experts." in name]  # noqa: SIM118
        num_weights = sum(math.prod(checkpoint.shape(name)) for name in names)
        needed["experts"] = num_copies * num_weights * dtype.itemsize
    return needed
