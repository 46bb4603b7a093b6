"""Where the KV store is, whose server it is, and what a start says of one that doesn't answer."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from cluster.config import Config
from cluster.errors import ConfigError
from deployments.redis_store import TenantBudgets, problem_of, store_address, store_server
from tests.support.store.redis_servers import redis_server


def config_of(tmp_path: Path, **store: object) -> Config:
    return Config.load(None, {"state_dir": str(tmp_path), "store": store})


def test_our_own_server_lives_for_a_with_block_and_keeps_its_data(tmp_path: Path) -> None:
    config, warnings = config_of(tmp_path), list[str]()
    address = store_address(config)
    assert address is not None and address.url == f"unix://{tmp_path}/redis/redis.sock"
    with store_server(config, warnings.append), address.client() as client:
        client.set("kept", "1")
    assert problem_of(address) is not None
    with store_server(config, warnings.append), address.client() as client:
        assert client.get("kept") == b"1"
    assert not warnings


def test_a_server_elsewhere_is_used_and_never_started(tmp_path: Path) -> None:
    with redis_server(tmp_path) as elsewhere:
        config, warnings = config_of(tmp_path, url=elsewhere.url), list[str]()
        with store_server(config, warnings.append):
            address = store_address(config)
            assert address is not None and problem_of(address) is None
    assert not warnings and not (tmp_path / "redis").exists()


@pytest.mark.parametrize("is_up", [False, True])
def test_a_start_says_why_a_server_elsewhere_wont_remember_and_goes_on(
    tmp_path: Path, is_up: bool
) -> None:
    config = config_of(tmp_path, url=f"unix://:wrong@{tmp_path}/redis.sock")
    warnings = list[str]()
    server = redis_server(tmp_path, "--requirepass", "right") if is_up else nullcontext()
    with server, store_server(config, warnings.append):
        (warning,) = warnings
    assert ("refuses the password" if is_up else "doesn't answer") in warning
    assert "wrong" not in warning.partition("(")[0] and "no context or session is stored" in warning


def test_an_impossible_address_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, url="http://localhost")
    with pytest.raises(ConfigError, match=r"store\.url"), store_server(config, print):
        pass


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-lfu", "allkeys-random"])
def test_a_server_that_may_throw_tenants_away_is_refused(tmp_path: Path, policy: str) -> None:
    with redis_server(tmp_path, "--maxmemory-policy", policy) as elsewhere:
        settings = {"state_dir": str(tmp_path), "store.url": elsewhere.url}
        with store_server(Config.load(None, settings), print):
            pass  # without keys it costs warmth at most
        config = Config.load(None, {**settings, "gateway.auth": "keys"})
        with (
            pytest.raises(ConfigError, match=f"policy {policy}, .* set it to noeviction"),
            store_server(config, print),
        ):
            pass


@pytest.mark.parametrize(
    "options",
    [
        ("--maxmemory-policy", "noeviction"),
        ("--maxmemory-policy", "volatile-lru"),
        ("--rename-command", "CONFIG", ""),
        ("--rename-command", "INFO", ""),
    ],
)
def test_a_server_that_keeps_tenants_or_does_not_say(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    warnings = list[str]()
    with redis_server(tmp_path, *options) as elsewhere:
        settings = {"state_dir": str(tmp_path), "store.url": elsewhere.url}
        config = Config.load(None, {**settings, "gateway.auth": "keys"})
        with store_server(config, warnings.append):
            pass
    is_silent = "INFO" not in options
    assert is_silent == (not warnings) and ("noeviction" in "".join(warnings)) == (not is_silent)


def test_each_tenant_may_have_a_budget_of_its_own() -> None:
    budgets = TenantBudgets(usual_bytes=100)
    budgets.set("ann", 5)
    assert (budgets.get("ann"), budgets.get("bob")) == (5, 100)
    budgets.set("ann", None)
    budgets.set("bob", None)
    assert (budgets.get("ann"), budgets.get("bob")) == (100, 100)


def test_no_store_without_prefix_caching_or_where_it_is_off(tmp_path: Path) -> None:
    assert store_address(config_of(tmp_path, enabled=False)) is None
    without = Config.load(None, {"engine.prefix_caching": False})
    assert store_address(without) is None
    with store_server(without, print):
        pass
    assert not (tmp_path / "redis").exists()
