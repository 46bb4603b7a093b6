"""What can be known to fail before any process is started: the model, the ports, the memory."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.config import Config
from cluster.errors import ConfigError, NotEnoughMemory, PortTaken
from cluster.spec import ModelSpec

PROCESS_BYTES = 350 << 20  # of a Python process with torch loaded


@dataclass(frozen=True, slots=True)
class Preflight:
    """What was found out on the way."""

    model_dir: Path
    spec: ModelSpec


def check(config: Config) -> Preflight:
    """Raises the error that the start would end in, with the same sentence, seconds earlier."""
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
    if config.device == "cpu" or not has_gpu():
        check_memory(config, model_dir)
    return Preflight(model_dir, spec)


def check_port(host: str, port: int, key: str) -> None:
    """Raises PortTaken, or ConfigError where the address is none of this machine's."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror:
            raise ConfigError(f"gateway.host {host!r} is not an address.") from None
        except PermissionError:
            raise ConfigError(f"{key} {port} needs privileges; choose one above 1023.") from None
        except OSError:
            raise PortTaken(
                f"Another process listens on {host}:{port}; choose another {key} "
                "(0 takes a free one)."
            ) from None


def check_memory(config: Config, model_dir: Path) -> None:
    """Raises NotEnoughMemory when weights, KV cache and processes can't fit in what is free."""
    weights = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    widened = 2 if config.dtype in ("auto", "float32") else 1  # checkpoints hold two bytes a weight
    is_remote = config.experts.mode == "remote"
    copies = config.experts.num_copies if is_remote else 1
    num_processes = 3 + (config.experts.num_hosts if is_remote else 0)
    needed = weights * widened * copies + config.engine.kv_bytes + num_processes * PROCESS_BYTES
    free = psutil.virtual_memory().available
    if needed > free:
        raise NotEnoughMemory(
            f"The model and its KV cache need about {needed / 1e9:.1f} GB of memory and "
            f"{free / 1e9:.1f} GB are free; lower engine.kv_bytes or choose a smaller model."
        )


def has_gpu() -> bool:
    """Whether the machine has an NVIDIA card, without loading CUDA."""
    return Path("/dev/nvidiactl").exists()
