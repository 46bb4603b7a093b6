"""Which copy of each group of experts is asked, and so which groups each host is asked for."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from experts.host_links import ExpertHostLink, ExpertHostLinks
from experts.routed_tokens import ExpertGroupTable


@dataclass(frozen=True, slots=True)
class HostShare:
    """What one host is asked for."""

    host: ExpertHostLink
    group_ids: tuple[int, ...]  # ascending
    is_asked: Tensor  # [num_experts] bool: the experts of those groups


@dataclass(frozen=True, slots=True)
class DispatchPlan:
    """Which copy of each group is asked, until a link opens or closes."""

    generation: object  # of the links, see ExpertHostLinks
    epoch: int
    shares: tuple[HostShare, ...]  # by host id
    unreachable: frozenset[int]  # groups without a linked host

    @staticmethod
    def empty() -> DispatchPlan:
        """Return a plan of no generation, which any other replaces."""
        return DispatchPlan(generation=None, epoch=0, shares=(), unreachable=frozenset())


def plan_dispatch(
    links: ExpertHostLinks,
    table: ExpertGroupTable,
    group_ids: Iterable[int],
    avoided: Container[tuple[str, int]] = (),
) -> DispatchPlan:
    """Choose a linked host for each group.

    Args:
        links: the hosts.
        table: the cut of the experts into groups.
        group_ids: the groups to ask for.
        avoided: pairs of host id and group that mustn't be asked.
    """
    generation, placement, linked = links.snapshot()
    group_to_hosts = {
        group_id: [
            host_id
            for host_id in placement.group_to_hosts[group_id]
            if host_id in linked and (host_id, group_id) not in avoided
        ]
        for group_id in group_ids
    }
    host_to_groups: dict[str, list[int]] = {}
    for group_id, host_id in choose_copies(group_to_hosts).items():
        host_to_groups.setdefault(host_id, []).append(group_id)
    shares = [
        HostShare(linked[host_id], tuple(sorted(groups)), table.experts_of(groups))
        for host_id, groups in sorted(host_to_groups.items())
    ]
    unreachable = frozenset(group_id for group_id, hosts in group_to_hosts.items() if not hosts)
    return DispatchPlan(generation, placement.epoch, tuple(shares), unreachable)


def choose_copies(group_to_hosts: Mapping[int, Sequence[str]]) -> dict[int, str]:
    """Choose one host for each group that has any, so that groups are spread evenly over hosts.

    Groups with the fewest copies choose first; among equals the earlier copy wins.
    """
    host_to_num_groups: dict[str, int] = {}
    choice: dict[int, str] = {}
    for group_id, hosts in sorted(group_to_hosts.items(), key=lambda item: (len(item[1]), item[0])):
        if hosts:
            host = min(hosts, key=lambda host: host_to_num_groups.get(host, 0))
            host_to_num_groups[host] = host_to_num_groups.get(host, 0) + 1
            choice[group_id] = host
    return choice
