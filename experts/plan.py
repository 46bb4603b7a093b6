"""Whom to ask: which copy of each group of experts, and so which groups of each host."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from experts.choices import GroupCut
from experts.peers import Peer, Peers


@dataclass(frozen=True, slots=True)
class Asked:
    """What one host is asked for."""

    peer: Peer
    group_ids: tuple[int, ...]
    is_asked: Tensor  # [num_experts] bool: the experts of those groups


@dataclass(frozen=True, slots=True)
class Plan:
    """Which copy of each group is asked, until a link opens or closes."""

    generation: object
    epoch: int
    asked: tuple[Asked, ...]
    missing: frozenset[int]  # the groups that nobody can be asked for


def make_plan(
    peers: Peers,
    cut: GroupCut,
    group_ids: Iterable[int],
    avoided: Container[tuple[str, int]] = (),
) -> Plan:
    """Whom to ask for these groups; a pair of host and group may be avoided."""
    generation, placement, alive = peers.snapshot()
    copies = {
        group_id: [
            host
            for host in placement.group_to_hosts[group_id]
            if host in alive and (host, group_id) not in avoided
        ]
        for group_id in group_ids
    }
    by_host: dict[str, list[int]] = {}
    for group_id, host in choose_copies(copies).items():
        by_host.setdefault(host, []).append(group_id)
    asked = [
        Asked(alive[host], tuple(sorted(groups)), cut.mask(groups))
        for host, groups in sorted(by_host.items())
    ]
    missing = frozenset(group_id for group_id, hosts in copies.items() if not hosts)
    return Plan(generation, placement.epoch, tuple(asked), missing)


def choose_copies(group_to_hosts: Mapping[int, Sequence[str]]) -> dict[int, str]:
    """One host for each group that has any, so that no host gets many more groups than another.

    Groups with the fewest copies choose first; among equals the earlier copy wins. Pure.
    """
    num_groups_of: dict[str, int] = {}
    choice: dict[int, str] = {}
    for group_id, hosts in sorted(group_to_hosts.items(), key=lambda item: (len(item[1]), item[0])):
        if hosts:
            host = min(hosts, key=lambda host: num_groups_of.get(host, 0))
            num_groups_of[host] = num_groups_of.get(host, 0) + 1
            choice[group_id] = host
    return choice
