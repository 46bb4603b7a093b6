"""Tenants in a real Redis, and the admission that follows them and survives its loss."""

from __future__ import annotations

import json
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from cluster.errors import (
    BrioletteError,
    InvalidRequest,
    PermissionDenied,
    QuotaExceeded,
    TenantExists,
    Unauthenticated,
    Unavailable,
    UnknownTenant,
)
from cluster.store.redis import RedisAddress
from cluster.tenants.admission import KeyAdmission
from cluster.tenants.directory import TENANTS, TenantDirectory, eviction_policy
from cluster.tenants.keys import new_key
from cluster.tenants.sessions import Sessions
from cluster.tenants.tenancy import Tenant
from tests.support.clock import Clock
from tests.support.store.redis_servers import redis_server
from tests.support.waiting import wait_for

LOCAL_KEY, LOCAL = new_key(0.0)
ANN = Tenant("ann", weight=2.0, tokens_per_minute=600, max_in_flight=3, models=("small",))


@pytest.fixture
def address(tmp_path: Path) -> Iterator[RedisAddress]:
    with redis_server(tmp_path) as address:
        yield address


@pytest.fixture
def now() -> Clock:
    return Clock()


@pytest.fixture
def tenants(address: RedisAddress, now: Clock) -> Iterator[TenantDirectory]:
    tenants = TenantDirectory(address, now)
    yield tenants
    tenants.close()


@contextmanager
def admitting(
    address: RedisAddress, now: Callable[[], float] = time.time
) -> Iterator[KeyAdmission]:
    copy = Path(address.url.removeprefix("unix://")).with_name("tenants.json")
    admission = KeyAdmission(address, copy, LOCAL, clock=now, now=now)
    try:
        yield admission
    finally:
        admission.close()


@pytest.fixture
def admission(address: RedisAddress, now: Clock) -> Iterator[KeyAdmission]:
    with admitting(address, now) as admission:
        yield admission


def is_let_in(admission: KeyAdmission, key: str) -> bool:
    try:
        admission.admit(key)
    except (Unauthenticated, PermissionDenied):
        return False
    return True


def refusal(admission: KeyAdmission, key: str | None) -> BrioletteError:
    with pytest.raises(BrioletteError) as caught:
        admission.admit(key)
    return caught.value


# Records


def test_a_tenant_is_kept_as_it_was_made(tenants: TenantDirectory, admission: KeyAdmission) -> None:
    key = tenants.create(ANN)
    admission.tenants.refresh()
    assert admission.tenants.snapshot.records["ann"].tenant == ANN == admission.admit(key).tenant
    assert admission.tenants.snapshot.records["ann"].created == 1000.0
    with pytest.raises(TenantExists, match="a tenant ann already"):
        tenants.create(ANN)
    with pytest.raises(InvalidRequest):
        tenants.create(Tenant("not a name"))


def test_neither_redis_nor_the_copy_has_a_key(
    tenants: TenantDirectory, admission: KeyAdmission, address: RedisAddress, tmp_path: Path
) -> None:
    secret = tenants.create(ANN).split("_")[2]
    admission.tenants.refresh()
    copy = tmp_path / "tenants.json"
    assert secret not in copy.read_text() and "ann" in copy.read_text()
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    with address.client() as client:
        assert secret not in str(client.hgetall(TENANTS))
        assert client.ttl(TENANTS) == -1  # it never expires


def test_terms_change_and_what_cannot_be_changes_nothing(
    tenants: TenantDirectory, admission: KeyAdmission
) -> None:
    key = tenants.create(ANN)
    tenants.update("ann", lambda tenant: replace(tenant, weight=5.0, tokens_per_minute=None))
    admission.tenants.refresh()
    assert admission.admit(key).tenant == replace(ANN, weight=5.0, tokens_per_minute=None)
    assert admission.tenants.kv_bytes("ann") is None is admission.tenants.kv_bytes("default")
    tenants.update("ann", lambda tenant: replace(tenant, kv_bytes=5 << 20))
    admission.tenants.refresh()
    assert admission.tenants.kv_bytes("ann") == 5 << 20
    with pytest.raises(PermissionDenied, match="nobody was deleted"):
        admission.tenants.kv_bytes("nobody")
    with pytest.raises(InvalidRequest):
        tenants.update("ann", lambda tenant: replace(tenant, weight=-1.0))
    for call in (
        lambda: tenants.update("bob", lambda tenant: tenant),
        lambda: tenants.rotate("bob"),
        lambda: tenants.delete("bob"),
    ):
        with pytest.raises(UnknownTenant, match="no tenant 'bob'"):
            call()
    assert tenants.read(admission.tenants.snapshot) is None


def test_the_number_of_tenants_is_bounded(
    tenants: TenantDirectory, admission: KeyAdmission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.tenants.directory.MAX_RECORDS", 2)
    tenants.create(ANN)
    tenants.create(Tenant("bob"))
    with pytest.raises(InvalidRequest, match="delete some"):
        tenants.create(Tenant("cat"))
    tenants.update("ann", lambda tenant: replace(tenant, weight=1.0))
    tenants.delete("bob")
    tenants.create(Tenant("cat"))
    admission.tenants.refresh()
    assert set(admission.tenants.snapshot.records) == {"ann", "cat"}


def test_two_who_change_one_tenant_lose_nothing(
    tenants: TenantDirectory, address: RedisAddress
) -> None:
    """The second one sees what the first one has done in between."""
    tenants.create(ANN)
    other = TenantDirectory(address)
    is_first = [True]

    def change(tenant: Tenant) -> Tenant:
        if is_first.pop():
            is_first.append(False)
            other.update("ann", lambda tenant: replace(tenant, max_in_flight=9))
        else:
            is_first.append(False)
        return replace(tenant, weight=7.0)

    changed = tenants.update("ann", change).tenant
    assert (changed.weight, changed.max_in_flight) == (7.0, 9)
    other.close()


def test_deleting_removes_what_the_tenant_had_kept_and_nothing_else(
    tenants: TenantDirectory, address: RedisAddress, admission: KeyAdmission
) -> None:
    key = tenants.create(ANN)
    with address.client() as client:
        for name in ("ann", "anna"):
            client.set(f"briolette:{{{name}}}:kv:1", "value")
            client.hset(f"briolette:{{{name}}}:session:trip", "content", "said")
        tenants.delete("ann")
        left = sorted(client.scan_iter("briolette:*"))
    assert left == [
        b"briolette:tenants",
        b"briolette:{anna}:kv:1",
        b"briolette:{anna}:session:trip",
    ]
    admission.tenants.refresh()
    assert not is_let_in(admission, key)


def test_a_tenant_is_disabled_on_a_full_server_too(
    tenants: TenantDirectory, address: RedisAddress, admission: KeyAdmission
) -> None:
    key = tenants.create(ANN)
    with address.client() as client:
        client.config_set("maxmemory", 1)
        with pytest.raises(redis.OutOfMemoryError):
            client.set("x", "y")
        tenants.update("ann", lambda tenant: replace(tenant, is_disabled=True))
    admission.tenants.refresh()
    assert not is_let_in(admission, key)


# Admission


def test_who_is_not_let_in(tenants: TenantDirectory, admission: KeyAdmission, now: Clock) -> None:
    key = tenants.create(ANN)
    admission.tenants.refresh()
    for nobody in (None, ""):
        assert isinstance(refusal(admission, nobody), Unauthenticated)
        assert "authorization: Bearer KEY" in str(refusal(admission, nobody))
    for wrong in ("x", key + "0", key[:-1], key.replace("brio", "sk"), "brio_é_\udcff"):
        error = refusal(admission, wrong)
        assert isinstance(error, Unauthenticated) and str(error) == "This key is unknown."
    tenants.update("ann", lambda tenant: replace(tenant, expires=now() + 60))
    admission.tenants.refresh()
    assert is_let_in(admission, key)
    now.now += 60
    assert str(refusal(admission, key)) == "Tenant ann has expired."
    tenants.update("ann", lambda tenant: replace(tenant, expires=None, is_disabled=True))
    admission.tenants.refresh()
    error = refusal(admission, key)
    assert isinstance(error, PermissionDenied) and "ann is disabled" in str(error)


def test_a_new_key_replaces_the_old_one_at_once_or_after_a_grace_period(
    tenants: TenantDirectory, admission: KeyAdmission, now: Clock
) -> None:
    first = tenants.create(ANN)
    second = tenants.rotate("ann")
    admission.tenants.refresh()
    assert not is_let_in(admission, first) and is_let_in(admission, second)
    third = tenants.rotate("ann", grace_s=3600)
    admission.tenants.refresh()
    now.now += 3599
    assert is_let_in(admission, second) and is_let_in(admission, third)
    fourth = tenants.rotate("ann", grace_s=3600)  # which gives the second one no second grace
    admission.tenants.refresh()
    now.now += 1
    assert "has expired" in str(refusal(admission, second))
    assert is_let_in(admission, third) and is_let_in(admission, fourth)
    assert len(admission.tenants.snapshot.records["ann"].keys) == 3
    tenants.rotate("ann")
    admission.tenants.refresh()
    assert len(admission.tenants.snapshot.records["ann"].keys) == 1


def test_a_lease_counts_against_the_tenant_whatever_its_key(
    tenants: TenantDirectory, admission: KeyAdmission
) -> None:
    first = tenants.create(ANN)
    second = tenants.rotate("ann", grace_s=60)
    admission.tenants.refresh()
    with admission.admit(first) as _, admission.admit(second), admission.admit(second):
        with pytest.raises(QuotaExceeded), admission.admit(first):
            pass
        admission.admit(first)  # what generates nothing is not in flight
    admission.admit(first).charge(600)
    tenants.update("ann", lambda tenant: replace(tenant, is_disabled=True))
    tenants.update("ann", lambda tenant: replace(tenant, is_disabled=False))
    admission.tenants.refresh()
    with pytest.raises(QuotaExceeded):  # a change forgives nothing
        admission.admit(second).charge(1)


def test_the_local_key_is_the_operators_and_needs_no_redis(tmp_path: Path) -> None:
    with admitting(RedisAddress(f"unix://{tmp_path}/none.sock", timeout_s=0.2)) as admission:
        lease = admission.admit(LOCAL_KEY)
        assert lease.tenant.is_admin and lease.tenant.name == "default"
        assert isinstance(refusal(admission, LOCAL_KEY + "0"), Unavailable)
        assert isinstance(refusal(admission, "brio_ab_cd"), Unavailable)  # who knows?


def test_changes_act_within_a_second(address: RedisAddress, tenants: TenantDirectory) -> None:
    with admitting(address) as admission:
        key = tenants.create(ANN)
        wait_for(lambda: is_let_in(admission, key), 1.0)
        tenants.update("ann", lambda tenant: replace(tenant, is_disabled=True))
        wait_for(lambda: not is_let_in(admission, key), 1.0)


def test_nothing_that_is_refused_shows_a_key(
    tenants: TenantDirectory, admission: KeyAdmission, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key = tenants.create(ANN)
    admission.tenants.refresh()
    secret = key.split("_")[2]
    shown = [
        repr(admission.admit(key)),
        repr(admission.tenants.snapshot.records),
        str(vars(admission)),
    ]
    for wrong in (key + "0", f"brio_00000000_{secret}", f"Bearer {key}"):
        shown.append(repr(refusal(admission, wrong)))
    assert secret not in "".join(shown) + caplog.text


# Sessions of tenants that go


@contextmanager
def sessions_of_a_late_gateway(
    address: RedisAddress, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Sessions]:
    """It doesn't look for changes by itself while a test runs."""
    monkeypatch.setattr("cluster.tenants.followed.POLL_S", 60.0)
    with admitting(address) as admission:
        budget_of = lambda tenant: admission.tenants.kv_bytes(tenant) or 1 << 20  # noqa: E731
        sessions = Sessions(address, 60.0, budget_of, admission.tenants.refresh)
        yield sessions
        sessions.close()


def keep(sessions: Sessions, tenant: str = "ann") -> None:
    sessions.save(tenant, "trip", ["hello"], [b"a"], fingerprint="f", num_tokens=1)


def test_what_another_gateway_deleted_keeps_no_session(
    address: RedisAddress, tenants: TenantDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ann", "bob"):
        tenants.create(Tenant(name))
    with sessions_of_a_late_gateway(address, monkeypatch) as sessions, address.client() as client:
        tenants.delete("ann")
        with pytest.raises(PermissionDenied, match="ann was deleted; nothing is kept"):
            keep(sessions)
        assert client.keys("briolette:{ann}*") == []
        for name in ("bob", "default"):  # who has no record
            keep(sessions, name)
            assert sessions.load(name, "trip").content == ["hello"]


def test_a_session_that_is_kept_while_its_tenant_goes_goes_too(
    address: RedisAddress, tenants: TenantDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenants.create(Tenant("ann"))
    with sessions_of_a_late_gateway(address, monkeypatch) as sessions, address.client() as client:
        scan, num_scans = redis.Redis.scan_iter, 0

        def scan_and_keep(self: redis.Redis, **options: Any) -> Iterator[Any]:
            nonlocal num_scans
            yield from scan(self, **options)
            num_scans += 1
            if num_scans == 1:
                keep(sessions)

        monkeypatch.setattr(redis.Redis, "scan_iter", scan_and_keep)
        tenants.delete("ann")
        assert num_scans == 2 and client.keys("briolette:{ann}*") == []


def test_a_deletion_that_breaks_off_can_be_asked_for_again(
    address: RedisAddress, tenants: TenantDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenants.create(Tenant("ann"))
    with sessions_of_a_late_gateway(address, monkeypatch) as sessions, address.client() as client:
        keep(sessions, "default")
        scan, num_scans = redis.Redis.scan_iter, 0

        def scan_once(self: redis.Redis, **options: Any) -> Iterator[Any]:
            nonlocal num_scans
            num_scans += 1
            if num_scans > 1:
                raise redis.ConnectionError("gone")
            yield from scan(self, **options)
            keep(sessions)

        monkeypatch.setattr(redis.Redis, "scan_iter", scan_once)
        with pytest.raises(Unavailable):
            tenants.delete("ann")
        assert client.keys("briolette:{ann}*")
        monkeypatch.setattr(redis.Redis, "scan_iter", scan)
        for name in ("ann", "default"):
            with pytest.raises(UnknownTenant, match=name):
                tenants.delete(name)
        assert client.keys("briolette:{ann}*") == []
        assert sessions.load("default", "trip").content == ["hello"]


def test_a_tenant_that_goes_while_a_session_is_kept_is_the_reason(
    address: RedisAddress, tenants: TenantDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleted after the gateway has looked again, and before it writes."""
    tenants.create(Tenant("ann"))
    with sessions_of_a_late_gateway(address, monkeypatch) as sessions:
        monkeypatch.setattr(sessions, "_refresh_tenants", lambda: None)
        tenants.delete("ann")
        with pytest.raises(PermissionDenied, match="ann was deleted; nothing is kept"):
            keep(sessions)


def test_a_loss_of_tenants_costs_nobody_a_session(
    address: RedisAddress, tenants: TenantDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenants.create(Tenant("ann"))
    with sessions_of_a_late_gateway(address, monkeypatch) as sessions, address.client() as client:
        client.flushall()
        keep(sessions)
        assert sessions.load("ann", "trip").content == ["hello"]
        assert client.hexists(TENANTS, "ann")


# Redis may go, and come back without its data


def test_known_keys_work_while_redis_is_away_and_after_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with redis_server(tmp_path) as address, admitting(address) as admission:
        key = TenantDirectory(address).create(ANN)
        admission.tenants.refresh()
        os.kill(pid_of(address), 9)
        wait_for(lambda: "known keys still work" in caplog.text)
        assert admission.admit(key).tenant == ANN
        assert "new keys aren't read while Redis is away" in str(refusal(admission, key + "0"))
        with pytest.raises(Unavailable):
            admission.tenants.directory.create(Tenant("bob"))
    with admitting(address) as admission:
        assert admission.admit(key).tenant == ANN


def test_a_redis_that_lost_its_data_gets_the_tenants_back(tmp_path: Path) -> None:
    with redis_server(tmp_path) as address, admitting(address) as admission:
        key = TenantDirectory(address).create(ANN)
        admission.tenants.refresh()
        with address.client() as client:
            client.flushall()
        wait_for(lambda: TenantDirectory(address).read(admission.tenants.snapshot) is None)
        assert is_let_in(admission, key)
    with redis_server(tmp_path) as address, admitting(address) as admission:  # empty again
        admission.tenants.refresh()
        assert is_let_in(admission, key)
        with pytest.raises(TenantExists):
            TenantDirectory(address).create(ANN)


def test_what_redis_lost_last_is_put_back(address: RedisAddress, admission: KeyAdmission) -> None:
    """A power failure must not undo a deletion."""
    tenants = TenantDirectory(address)
    key = tenants.create(ANN)
    with address.client() as client:
        before = client.dump(TENANTS)
        tenants.delete("ann")
        admission.tenants.refresh()
        client.restore(TENANTS, 0, before, replace=True)
    wait_for(lambda: tenants.read(admission.tenants.snapshot) is None)
    assert not is_let_in(admission, key)


def test_a_change_right_after_a_loss_first_puts_back_what_was_lost(
    address: RedisAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the next look, which is a matter of luck."""
    monkeypatch.setattr("cluster.tenants.followed.POLL_S", 60.0)
    with admitting(address) as admission, address.client() as client:
        tenants = admission.tenants.directory
        key = tenants.create(ANN)
        client.flushall()
        tenants.create(Tenant("bob"))
        with pytest.raises(TenantExists):
            tenants.create(ANN)
        before = client.dump(TENANTS)
        tenants.update("ann", lambda tenant: replace(tenant, is_disabled=True))
        client.restore(TENANTS, 0, before, replace=True)  # without its last change
        tenants.create(Tenant("cat"))
        admission.tenants.refresh()
        assert set(admission.tenants.snapshot.records) == {"ann", "bob", "cat"}
        assert isinstance(refusal(admission, key), PermissionDenied)


def test_a_loss_in_the_middle_of_a_change_is_put_back_too(
    address: RedisAddress, tenants: TenantDirectory
) -> None:
    tenants.create(ANN)
    tenants.create(Tenant("bob"))
    with address.client() as client:
        flushes = iter([True])

        def flush_once(tenant: Tenant) -> Tenant:
            if next(flushes, False):
                client.flushall()
            return replace(tenant, weight=7.0)

        assert tenants.update("ann", flush_once).tenant.weight == 7.0
        assert client.hkeys(TENANTS).count(b"bob") == 1


def test_other_tenants_at_the_same_version_are_seen_and_those_before_are_kept(
    address: RedisAddress,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Changed elsewhere, by a process that had not seen what Redis then lost."""
    monkeypatch.setattr("cluster.tenants.followed.POLL_S", 60.0)
    with admitting(address) as admission, address.client() as client:
        first = admission.tenants.directory.create(ANN)
        admission.tenants.refresh()
        client.flushall()
        other = TenantDirectory(address)
        other.create(Tenant("bob"))
        other.close()
        client.hset(TENANTS, "=lineage", admission.tenants.snapshot.lineage)
        admission.tenants.refresh()
        assert set(admission.tenants.snapshot.records) == {"bob"}
        assert not is_let_in(admission, first)
    assert "the 1 that were known until now are in" in caplog.text
    assert "ann" in (tmp_path / "tenants.json.bak").read_text()


def test_another_clusters_redis_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    with redis_server(tmp_path / "old") as address, admitting(address) as admission:
        tenants = TenantDirectory(address)
        key = tenants.create(ANN)
        for _ in range(3):
            tenants.update("ann", lambda tenant: replace(tenant, weight=tenant.weight + 1))
        admission.tenants.refresh()
    (tmp_path / "old" / "tenants.json").rename(tmp_path / "new" / "tenants.json")
    with redis_server(tmp_path / "new") as address:
        other = TenantDirectory(address).create(Tenant("bob"))
        with admitting(address) as admission:
            assert is_let_in(admission, other) and not is_let_in(admission, key)
    assert "ann" in (tmp_path / "new" / "tenants.json.bak").read_text()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"lineage": "x"}', '{"records": {"a": "{}"}}'])
def test_a_damaged_copy_is_ignored(
    tenants: TenantDirectory, address: RedisAddress, tmp_path: Path, text: str
) -> None:
    key = tenants.create(ANN)
    (tmp_path / "tenants.json").write_text(text)
    with admitting(address) as admission:
        assert is_let_in(admission, key)
    assert json.loads((tmp_path / "tenants.json").read_text())["version"] == 1


def test_a_damaged_record_keeps_only_its_tenant_out(
    tenants: TenantDirectory, address: RedisAddress, admission: KeyAdmission
) -> None:
    ann, bob = tenants.create(ANN), tenants.create(Tenant("bob"))
    with address.client() as client:
        client.hset(TENANTS, "ann", '{"tenant": {"name": "ann"}')
        client.hincrby(TENANTS, "=version", 1)
    admission.tenants.refresh()
    assert is_let_in(admission, bob) and not is_let_in(admission, ann)
    with pytest.raises(UnknownTenant):
        tenants.rotate("ann")
    again = tenants.create(ANN)
    admission.tenants.refresh()
    assert is_let_in(admission, again)


def test_the_policy_is_known_without_config(tmp_path: Path) -> None:
    options = ("--maxmemory-policy", "allkeys-lru", "--rename-command", "CONFIG", "")
    with redis_server(tmp_path, *options) as address:
        assert eviction_policy(address) == "allkeys-lru"


def pid_of(address: RedisAddress) -> int:
    with address.client() as client:
        return int(client.info("server")["process_id"])
