"""Meters: what a host tells Prometheus is as new as the scrape."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from deployments.meters import HostMeter
from experts.host import ExpertHost


@dataclass
class Host:
    """The part of an ExpertHost that is metered."""

    host_id: str = "host0"
    expert_load: list[list[int]] = field(default_factory=lambda: [[0, 0], [0, 0]])

    def stats(self) -> Any:
        return self


def test_a_scrape_shows_the_load_of_now() -> None:
    host = Host()
    registry = HostMeter(cast(ExpertHost, host), "m").registry

    def shown() -> list[float]:
        samples = [sample for family in registry.collect() for sample in family.samples]
        return [s.value for s in samples if s.name == "briolette_expert_tokens_total"]

    assert shown() == [0, 0]
    host.expert_load = [[3, 1], [0, 2]]
    assert shown() == [4, 2]
    assert shown() == [4, 2]
