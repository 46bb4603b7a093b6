"""Which expert host holds which group of experts, under an epoch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """The fixed cut of the experts of every layer into groups.

    A group is the unit that is placed, copied, moved, and summed: the cut never depends on the
    placement, so neither does any bit of the result.
    """

    num_experts: int
    num_groups: int

    def __post_init__(self) -> None:
        assert 1 <= self.num_groups <= self.num_experts

    def group_of(self, expert_id: int) -> int:
        """The group that owns a logical expert."""
        return expert_id * self.num_groups // self.num_experts

    def experts_of(self, group_id: int) -> range:
        """The logical experts of a group, ascending."""
        first = -(-group_id * self.num_experts // self.num_groups)
        last = -(-(group_id + 1) * self.num_experts // self.num_groups)
        return range(first, last)


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """`group_to_hosts[g]` lists the hosts that hold a copy of group g, first choice first."""

    epoch: int
    groups: ExpertGroups
    group_to_hosts: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        assert len(self.group_to_hosts) == self.groups.num_groups
        for hosts in self.group_to_hosts:
            assert hosts and len(set(hosts)) == len(hosts), "each group needs distinct hosts"

    @property
    def host_ids(self) -> list[str]:
        """Every host that holds something, in a stable order."""
        return sorted({host for hosts in self.group_to_hosts for host in hosts})

    def groups_of(self, host_id: str) -> tuple[int, ...]:
        """The groups that a host holds a copy of, ascending."""
        return tuple(g for g, hosts in enumerate(self.group_to_hosts) if host_id in hosts)

    @staticmethod
    def spread(
        groups: ExpertGroups, host_ids: list[str], num_copies: int = 1, epoch: int = 1
    ) -> ExpertPlacement:
        """Deal the groups to the hosts in turn; copies of a group never share a host."""
        num_hosts = len(host_ids)
        assert 1 <= num_copies <= num_hosts, "copies of a group never share a host"
        table = tuple(
            tuple(host_ids[(g + copy) % num_hosts] for copy in range(num_copies))
            for g in range(groups.num_groups)
        )
        return ExpertPlacement(epoch, groups, table)
