"""Who gets what on one machine: expert groups to hosts, cards and cores to parts."""

from __future__ import annotations

import os

from cluster.config import Config
from cluster.links import AUTO
from cluster.placement import ExpertGroups, ExpertPlacement
from cluster.spec import ModelSpec


def place_experts(config: Config, spec: ModelSpec) -> ExpertPlacement | None:
    """The first placement; None where the decoder computes the experts or the model has none."""
    experts = config.experts
    if not spec.is_moe or experts.mode == "local":
        return None
    host_ids = [f"host{i}" for i in range(experts.num_hosts)]
    return ExpertPlacement.spread(expert_groups(config, spec), host_ids, experts.num_copies)


def expert_groups(config: Config, spec: ModelSpec) -> ExpertGroups:
    """The fixed cut of the experts; never more groups than experts."""
    return ExpertGroups(spec.num_experts, min(config.experts.num_groups, spec.num_experts))


def host_gpus(config: Config, num_gpus: float, num_hosts: int) -> float:
    """GPUs for each expert host: as configured, else an even share with the decoder."""
    if config.experts.num_gpus_per_host is not None:
        return config.experts.num_gpus_per_host
    return _gpu_share(config, num_gpus, num_hosts + 1)


def decoder_gpus(config: Config, num_gpus: float, num_hosts: int) -> float:
    """GPUs for the decoder: what the hosts leave, at most one."""
    left = num_gpus - num_hosts * host_gpus(config, num_gpus, num_hosts)
    return 0.0 if config.device == "cpu" else max(0.0, min(1.0, left))


def decoder_threads(config: Config, num_hosts: int) -> int:
    """CPU threads of the decoder; attention and the dense MLP run while the hosts compute."""
    return config.engine.threads or _core_share(num_hosts + 1)


def host_threads(config: Config, num_hosts: int) -> int:
    """CPU threads of each expert host."""
    return config.experts.threads or _core_share(num_hosts + 1)


def transports(config: Config) -> tuple[str, ...]:
    """What links may use, in order of preference."""
    return tuple(AUTO) if config.experts.transport == "auto" else ("tcp",)


def _gpu_share(config: Config, num_gpus: float, num_parts: int) -> float:
    """Whole cards where there are enough; Ray cuts a card in ten-thousandths."""
    if config.device == "cpu" or num_gpus <= 0:
        return 0.0
    return 1.0 if num_gpus >= num_parts else int(10_000 * num_gpus / num_parts) / 10_000


def _core_share(num_parts: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // num_parts)
