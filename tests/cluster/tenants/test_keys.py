"""Keys, quotas and terms: what is kept of a key, the arithmetic of a quota, what can't be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from cluster.errors import InvalidRequest, PermissionDenied, QuotaExceeded
from cluster.tenants.admission import OpenAdmission
from cluster.tenants.keys import new_key, split_key
from cluster.tenants.quota import Quota, TokenBucket
from cluster.tenants.tenancy import Tenant
from tests.support.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_key_is_known_again_and_cannot_be_made_from_what_is_kept() -> None:
    key, kept = new_key(now=5.0)
    key_id, secret = split_key(key) or ("", "")
    assert key.startswith("brio_") and len(secret) == 64 and key_id == kept.key_id
    assert kept.matches(secret) and kept.created == 5.0 and kept.expires is None
    assert not kept.matches(secret[:-1]) and not kept.matches("") and not kept.matches("é\udcff")
    assert secret not in repr(kept) and secret not in str(dataclasses.asdict(kept))


def test_two_keys_share_nothing() -> None:
    (_, first), (key, second) = new_key(0.0), new_key(0.0)
    assert first.key_id != second.key_id and first.salt != second.salt
    assert not first.matches((split_key(key) or ("", ""))[1])


@pytest.mark.parametrize("text", ["", "brio", "brio_ab", "sk_ab_cd", "brio_a_b_c", "Bearer x"])
def test_what_is_no_key(text: str) -> None:
    assert split_key(text) is None


# Quotas


def exceeded(call: Callable[[], object]) -> tuple[str, float | None]:
    with pytest.raises(QuotaExceeded) as caught:
        call()
    return str(caught.value), caught.value.retry_after_s


def test_a_bucket_holds_a_minute_and_fills_evenly(clock: Clock) -> None:
    bucket = TokenBucket(600, clock)
    assert bucket.wait_s(600) == 0.0
    bucket.take(600)
    assert bucket.wait_s(30) == pytest.approx(3.0)
    clock.now += 3.0
    assert bucket.wait_s(30) == 0.0 and bucket.wait_s(31) == pytest.approx(0.1)
    clock.now += 3600
    assert bucket.wait_s(600) == 0.0 and bucket.wait_s(601) > 0  # a minute's worth at most


def test_another_quota_keeps_what_share_was_used(clock: Clock) -> None:
    bucket = TokenBucket(600, clock)
    bucket.take(300)
    bucket.resize(1200)
    assert bucket.wait_s(600) == 0.0 and bucket.wait_s(620) == pytest.approx(1.0)
    bucket.take(1800)  # a debt of a minute
    bucket.resize(60)
    assert bucket.wait_s(1) == pytest.approx(61.0)


def test_a_limit_that_was_away_comes_back_as_it_was(clock: Clock) -> None:
    quota = Quota(Tenant("ann", tokens_per_minute=600), clock)
    quota.charge(600)
    quota.charge_output(300)
    quota.update(Tenant("ann"))
    quota.charge(100_000)  # counts against nothing
    clock.now += 30
    quota.update(Tenant("ann", tokens_per_minute=1200))
    with pytest.raises(QuotaExceeded):
        quota.charge(1)
    clock.now += 0.1
    quota.charge(1)


def test_a_prompt_waits_until_the_bucket_allows_it(clock: Clock) -> None:
    quota = Quota(Tenant("ann", tokens_per_minute=600), clock)
    quota.charge(500)
    sentence, retry_after_s = exceeded(lambda: quota.charge(400))
    assert retry_after_s == pytest.approx(30.0)
    assert sentence == "The tenant ann has used its 600 tokens a minute; retry after 30.0 s."
    quota.charge(100)  # nothing was taken
    clock.now += 40.0
    quota.charge(400)


def test_waiting_as_long_as_was_said_is_enough(clock: Clock) -> None:
    quota = Quota(Tenant("ann", tokens_per_minute=7), clock)
    for num_tokens in (7, 3, 5, 1, 6, 7, 2):
        try:
            quota.charge(num_tokens)
        except QuotaExceeded as error:
            assert error.retry_after_s is not None
            clock.now += error.retry_after_s
            quota.charge(num_tokens)


def test_an_answer_leaves_a_debt_that_the_next_request_waits_for(clock: Clock) -> None:
    quota = Quota(Tenant("ann", tokens_per_minute=60), clock)
    quota.__enter__()
    quota.charge(50)
    quota.charge_output(40)
    quota.__exit__()
    _, retry_after_s = exceeded(quota.__enter__)  # before anything is tokenized
    assert retry_after_s == pytest.approx(31.0)
    clock.now += 31.0
    quota.__enter__()
    quota.refund(50)  # what a refused request had been charged
    clock.now += 10.0
    quota.charge(60)


def test_a_prompt_longer_than_a_minute_is_no_matter_of_waiting(clock: Clock) -> None:
    quota = Quota(Tenant("ann", tokens_per_minute=100), clock)
    with pytest.raises(InvalidRequest, match=r"101 tokens.* 100 in a minute") as caught:
        quota.charge(101)
    assert caught.value.retry_after_s is None
    quota.charge(100)


def test_requests_in_flight_are_counted(clock: Clock) -> None:
    quota = Quota(Tenant("ann", max_in_flight=2), clock)
    quota.__enter__()
    quota.__enter__()
    sentence, retry_after_s = exceeded(quota.__enter__)
    assert "has 2 requests in flight, its limit" in sentence and retry_after_s == 1.0
    quota.__exit__()
    quota.__enter__()
    quota.update(Tenant("ann"))
    for _ in range(100):
        quota.__enter__()
    quota.charge(10**9)
    quota.charge_output(10**9)


# Terms


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"name": ""}, "1 to 64 letters"),
        ({"name": "-ann"}, "begins with a letter"),
        ({"name": "ann\n"}, "letters"),
        ({"name": 'a"b'}, "letters"),
        ({"name": "=version"}, "letters"),
        ({"name": "x" * 65}, "64"),
        ({"name": "default"}, "operator's own"),
        ({"weight": 0.0}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"weight": float("inf")}, "weight"),
        ({"tokens_per_minute": 0}, "from 1 to"),
        ({"max_in_flight": -1}, "from 1 to"),
        ({"kv_bytes": 1000}, "1,048,576 and"),
        ({"models": ("",)}, "models"),
        ({"models": ("x",) * 33}, "32 models"),
        ({"expires": float("nan")}, "time"),
        ({"expires": 1e12}, "time"),
    ],
)
def test_terms_that_cannot_be(terms: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        Tenant(**{"name": "ann", **terms}).check()


def test_names_that_can_be() -> None:
    for name in ("a", "Ann", "7", "team.red_2-b", "x" * 64):
        assert Tenant(name).check().name == name


def test_allowed_models() -> None:
    Tenant("ann").check_model("any")
    some = Tenant("ann", models=("small", "large"))
    some.check_model("large")
    with pytest.raises(PermissionDenied, match="ann may not use the model huge"):
        some.check_model("huge")


def test_without_keys_everybody_is_one_tenant_that_may_all() -> None:
    lease = OpenAdmission().admit(None)
    with lease:
        lease.charge(10**9)
        lease.charge_output(10**9)
        lease.refund(10**9)
    assert lease.tenant.name == "default"
    lease.tenant.check_admin()
    with pytest.raises(PermissionDenied, match="operator's key"):
        Tenant("ann").check_admin()
