"""Layout: every part fits on the cards, however many there are and in whatever order they come."""

from __future__ import annotations

import itertools

import pytest

from cluster.config import Config
from cluster.errors import ConfigError
from deployments.layout import decoder_gpus, host_gpus


def fits(num_cards: int, shares: tuple[float, ...]) -> bool:
    """Whether first-fit, which Ray may be, finds a card for each part in this order."""
    free = [1.0] * num_cards
    for share in shares:
        card = next((card for card in range(num_cards) if free[card] >= share - 1e-9), None)
        if card is None:
            return False
        free[card] -= share
    return True


@pytest.mark.parametrize("num_cards", range(1, 7))
@pytest.mark.parametrize("num_hosts", range(1, 6))
def test_every_part_finds_a_card(num_cards: int, num_hosts: int) -> None:
    config = Config()
    host = host_gpus(config, num_cards, num_hosts)
    decoder = decoder_gpus(config, num_cards, num_hosts)
    assert 0 < host <= 1 and 0 < decoder <= 1
    shares = [decoder] + [host] * num_hosts
    assert all(fits(num_cards, order) for order in set(itertools.permutations(shares)))
    if num_cards >= num_hosts:
        assert host > 0.5  # no two hosts on one card


def test_without_cards_nobody_asks_for_one() -> None:
    assert host_gpus(Config(), 0.0, 2) == decoder_gpus(Config(), 0.0, 2) == 0.0
    on_cpu = Config.load(None, {"device": "cpu"})
    assert host_gpus(on_cpu, 2.0, 2) == decoder_gpus(on_cpu, 2.0, 2) == 0.0


def test_hosts_that_leave_no_card_to_the_decoder() -> None:
    changes = {"device": "cuda", "experts.num_gpus_per_host": 1}
    assert decoder_gpus(Config.load(None, changes), 3.0, 2) == 1.0
    with pytest.raises(ConfigError, match="num_gpus_per_host"):
        decoder_gpus(Config.load(None, changes), 2.0, 2)
