"""The division of one machine: expert groups to hosts, GPUs and CPU threads to processes."""

from __future__ import annotations

import math
import os

from cluster.config import Config
from cluster.errors import ConfigError
from cluster.links.connect import AUTO
from cluster.placement import ExpertGroups, ExpertPlacement
from cluster.spec import ModelSpec


def place_experts(config: Config, spec: ModelSpec) -> ExpertPlacement | None:
    """Return the first placement; None if the decoder computes the experts or there are none."""
    experts = config.experts
    if not spec.is_moe or experts.mode == "local":
        return None
    host_ids = [f"host{i}" for i in range(experts.num_hosts)]
    return ExpertPlacement.spread(expert_groups(config, spec), host_ids, experts.num_copies)


def expert_groups(config: Config, spec: ModelSpec) -> ExpertGroups:
    """Return the fixed cut of the experts into groups; there are never more groups than experts."""
    return ExpertGroups(spec.num_experts, min(config.experts.num_groups, spec.num_experts))


def host_gpus(config: Config, num_gpus: float, num_hosts: int) -> float:
    """Return the GPUs of each expert host: as configured, else a share such that every part fits.

    Ray takes a fraction from one GPU, in ten-thousandths.

    Args:
        config: The configuration.
        num_gpus: GPUs that Ray has.
        num_hosts: Expert hosts, beside one decoder.
    """
    if config.experts.num_gpus_per_host is not None:
        return config.experts.num_gpus_per_host
    num_whole_gpus, num_parts = int(num_gpus), num_hosts + 1
    if config.device == "cpu" or num_whole_gpus == 0:
        return 0.0
    if num_whole_gpus >= num_parts:
        return 1.0
    if num_whole_gpus == num_hosts:
        return 0.6  # over a half: a GPU for each host, and the decoder beside one of them
    return 10_000 // math.ceil(num_parts / num_whole_gpus) / 10_000


def decoder_gpus(config: Config, num_gpus: float, num_hosts: int) -> float:
    """Return the GPUs of the decoder: what some GPU has left, however Ray spreads the hosts.

    Args:
        config: The configuration.
        num_gpus: GPUs that Ray has.
        num_hosts: Expert hosts.

    Returns:
        At most one; 0 for a decoder on the CPU.

    Raises:
        ConfigError: The hosts leave nothing to a decoder that must have a GPU.
    """
    num_whole_gpus, per_host = int(num_gpus), host_gpus(config, num_gpus, num_hosts)
    if config.device == "cpu" or num_whole_gpus == 0:
        return 0.0
    if per_host >= 1:
        share = 1.0 if num_whole_gpus - num_hosts * per_host >= 1 else 0.0
    else:  # some GPU has no more hosts than the average
        share = max(0.0, round(1 - num_hosts // num_whole_gpus * per_host, 4))
    if share == 0 and config.device != "auto":
        raise ConfigError(
            f"{num_hosts} expert hosts with {per_host:g} GPUs each leave none of "
            f"{num_whole_gpus} to the decoder; lower experts.num_gpus_per_host or "
            "experts.num_hosts."
        )
    return share


def decoder_threads(config: Config, num_hosts: int) -> int:
    """Return the CPU threads of the decoder, which computes while the expert hosts do."""
    return config.engine.threads or _core_share(num_hosts + 1)


def host_threads(config: Config, num_hosts: int) -> int:
    """Return the CPU threads of each expert host."""
    return config.experts.threads or _core_share(num_hosts + 1)


def transports(config: Config) -> tuple[str, ...]:
    """Return the transports that links may use, the preferred one first."""
    return tuple(AUTO) if config.experts.transport == "auto" else ("tcp",)


def _core_share(num_parts: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // num_parts)
