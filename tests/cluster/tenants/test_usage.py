"""Usage: every request that ended counts once, through cancels, outages and restarts."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import Iterator
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx2 as httpx
import pytest
from redis.client import Pipeline
from rich.console import Console

from cluster.errors import InvalidRequest, PermissionDenied, Unavailable
from cluster.store.redis import RedisAddress
from cluster.tenants.admission import OpenLease
from cluster.tenants.tenancy import Tenant
from cluster.tenants.usage import KEPT_S, UsageBooks, Used, today
from deployments.commands import usage as usage_commands
from deployments.commands.client import Client
from deployments.gateway.calls.client_call import ClientCall
from deployments.gateway.gateway import Gateway
from deployments.gateway.services.usage import UsageService
from protos.briolette.v1.admin_pb2 import DayUsage, GetUsageRequest
from protos.briolette.v1.admin_pb2_grpc import AdminStub
from protos.briolette.v1.inference_pb2_grpc import InferenceStub
from tests.support.gateway.fake_decoder import Decoder, make_tokenizer
from tests.support.gateway.requests import complete, failure
from tests.support.gateway.running import running_gateway, serving
from tests.support.store.redis_servers import redis_server
from tests.support.waiting import wait_for

DAY = date(2026, 11, 24)
REQUEST = Used(requests=1, prompt_tokens=50, output_tokens=7, cached_tokens=32, saved_prefill_s=0.5)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[RedisAddress]:
    with redis_server(tmp_path) as address:
        yield address


def times(count: int) -> Used:
    used = Used()
    for _ in range(count):
        used.add(REQUEST)
    return used


def rows(books: UsageBooks, since: date = DAY, until: date = DAY) -> list[tuple[date, str, Used]]:
    return [(row.day, row.tenant, row.used) for row in books.read(since, until)]


# The books


def test_days_add_up_over_gateways_and_restarts(address: RedisAddress) -> None:
    yesterday = DAY - timedelta(days=1)
    for day in (DAY, yesterday, DAY):
        books = UsageBooks(address)
        books.count("bob", REQUEST, day)
        books.count("ann", REQUEST, day)
        books.count("ann", REQUEST, day)
        books.close()
    books = UsageBooks(address)
    assert rows(books) == [(DAY, "ann", times(4)), (DAY, "bob", times(2))]
    assert rows(books, yesterday, yesterday) == [
        (yesterday, "ann", times(2)),
        (yesterday, "bob", times(1)),
    ]
    assert len(rows(books, yesterday, DAY)) == 4
    assert [row.tenant for row in books.read(yesterday, DAY, ["bob"])] == ["bob", "bob"]
    client = address.client()
    left = [client.ttl(key) for key in client.keys("briolette:usage:*")]
    assert len(left) == 6 and all(KEPT_S - 60 < seconds <= KEPT_S for seconds in left)
    books.close()


def test_counting_without_redis_is_in_memory() -> None:
    books = UsageBooks(None)
    books.count("ann", REQUEST)
    assert rows(books, today(), today()) == [(today(), "ann", REQUEST)]
    books.close()


def test_an_outage_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.tenants.usage.FLUSH_S", 0.05)
    with redis_server(tmp_path) as address:
        books = UsageBooks(address)
        books.count("ann", REQUEST, DAY)
        books.flush()
    books.count("ann", REQUEST, DAY)
    with pytest.raises(Unavailable, match="Redis"):
        books.read(DAY, DAY)
    books.count("ann", REQUEST, DAY)
    with redis_server(tmp_path) as address:  # an empty one
        other = UsageBooks(address)
        wait_for(lambda: rows(other) == [(DAY, "ann", times(2))])  # it writes by itself
        other.close()
        books.close()


def test_a_batch_whose_answer_got_lost_counts_once(
    address: RedisAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    books, execute = UsageBooks(address), Pipeline.execute

    def execute_without_answer(self: Pipeline, raise_on_error: bool = True) -> Any:
        execute(self, raise_on_error)
        raise OSError("the connection broke")

    monkeypatch.setattr(Pipeline, "execute", execute_without_answer)
    books.count("ann", REQUEST, DAY)
    for _ in range(2):
        with pytest.raises(Unavailable):
            books.flush()
    books.count("ann", REQUEST, DAY)  # meanwhile: another batch
    monkeypatch.setattr(Pipeline, "execute", execute)
    assert rows(books) == [(DAY, "ann", times(2))]
    books.close()


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.tenants.usage.MAX_WAITING", 3)
    books = UsageBooks(None)
    for i in range(5):
        books.count("ann", REQUEST, DAY + timedelta(days=i))
    kept = [day for day, _, _ in rows(books, DAY, DAY + timedelta(days=9))]
    assert kept == [DAY + timedelta(days=i) for i in (2, 3, 4)]


# What requests count


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Decoder, Gateway]]:
    decoder, tokenizer = Decoder(make_tokenizer()), make_tokenizer()
    with running_gateway(tokenizer, decoder.find) as gateway:
        wait_for(lambda: serving(gateway))
        yield decoder, gateway
    decoder.close()


@pytest.fixture
def channel(cluster: tuple[Decoder, Gateway]) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{cluster[1].port}") as channel:
        yield channel
    cluster[0].runner.step_s, cluster[0].runner.error = 0.0, None


def used_today(channel: grpc.Channel) -> DayUsage:
    days = AdminStub(channel).GetUsage(GetUsageRequest()).days
    return days[0] if days else DayUsage()


class Growth:
    """What is counted since its creation."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._before = used_today(channel)

    def __call__(self) -> tuple[int, int, int]:
        """Requests, tokens in, tokens out."""
        now, before = used_today(self._channel), self._before
        return (
            now.requests - before.requests,
            now.prompt_tokens - before.prompt_tokens,
            now.output_tokens - before.output_tokens,
        )


def test_an_answer_counts_before_the_client_has_it(channel: grpc.Channel) -> None:
    growth = Growth(channel)
    InferenceStub(channel).CompleteOnce(complete("abc", max_tokens=8))
    assert growth() == (1, 3, 8)
    list(InferenceStub(channel).Complete(complete("abcd", max_tokens=5)))
    assert growth() == (2, 7, 13)


def test_a_cancelled_answer_counts_what_was_computed(
    cluster: tuple[Decoder, Gateway], channel: grpc.Channel
) -> None:
    cluster[0].runner.step_s = 0.02
    growth = Growth(channel)
    stream = InferenceStub(channel).Complete(complete("abc", max_tokens=400))
    seen = [next(stream) for _ in range(4)]
    stream.cancel()
    wait_for(lambda: growth()[0] == 1)
    requests, tokens_in, tokens_out = growth()
    assert (requests, tokens_in) == (1, 3)
    assert sum(len(piece.token_ids) for piece in seen) <= tokens_out < 50


def test_a_request_that_was_never_begun_costs_nothing(
    cluster: tuple[Decoder, Gateway], channel: grpc.Channel
) -> None:
    """Four run at a time; the fifth waits."""
    cluster[0].runner.step_s = 0.02
    stub, growth = InferenceStub(channel), Growth(channel)
    running = [stub.Complete(complete("a", max_tokens=300)) for _ in range(4)]
    for stream in running:
        next(stream)
    waiting = stub.Complete(complete("abcdef", max_tokens=300))
    wait_for(lambda: cluster[0].engine.stats().num_waiting == 1)
    waiting.cancel()
    wait_for(lambda: growth()[0] == 1)
    assert growth() == (1, 0, 0)
    for stream in running:
        stream.cancel()
    wait_for(lambda: growth()[0] == 5)
    assert growth()[1] == 4


def test_late_and_failed_requests_count(
    cluster: tuple[Decoder, Gateway], channel: grpc.Channel
) -> None:
    decoder, stub, growth = cluster[0], InferenceStub(channel), Growth(channel)
    decoder.runner.step_s = 0.02
    assert failure(lambda: stub.CompleteOnce(complete(max_tokens=400), timeout=0.3))[0] == (
        "DEADLINE_EXCEEDED"
    )
    wait_for(lambda: growth()[0] == 1)
    assert growth()[2] > 3
    before, decoder.runner.error = growth(), ValueError("a bug")
    assert failure(lambda: stub.CompleteOnce(complete("abc")))[0] == "INTERNAL"
    assert growth() == (before[0] + 1, before[1], before[2])  # nothing of it was computed
    assert failure(lambda: stub.CompleteOnce(complete("")))[0] == "INVALID_ARGUMENT"
    assert growth()[0] == before[0] + 1  # the decoder never saw it


@pytest.mark.parametrize("part", ["gateway", "decoder"])
def test_a_part_that_stops_counts_what_it_cuts_short(part: str) -> None:
    decoder, tokenizer, http = Decoder(make_tokenizer()), make_tokenizer(), httpx.Client()
    decoder.runner.step_s = 0.02
    books = UsageBooks(None)
    with running_gateway(tokenizer, decoder.find, usage=books) as gateway:
        wait_for(lambda: serving(gateway))
        channel = grpc.insecure_channel(f"127.0.0.1:{gateway.port}")
        over_grpc = InferenceStub(channel).Complete(complete("abc", max_tokens=400))
        body = {"prompt": "abcde", "max_tokens": 400, "stream": True}
        request = http.build_request("POST", f"{gateway.base_url}/completions", json=body)
        over_http = http.send(request, stream=True).iter_lines()
        for _ in range(5):
            next(over_grpc), next(over_http)
        if part == "decoder":
            decoder.loop.close()
            assert failure(lambda: list(over_grpc))[0] == "UNAVAILABLE"
            assert any("is stopping" in line for line in over_http)
    ((_, _, used),) = rows(books, today(), today())
    assert (used.requests, used.prompt_tokens) == (2, 8) and 6 < used.output_tokens < 100
    for end in (channel, http, decoder):
        end.close()


# Who may ask, and how


@pytest.mark.parametrize("day", ["yesterday", "0001-01-10", "1999-12-31"])
def test_a_day_that_no_report_has(day: str) -> None:
    service, root = UsageService(UsageBooks(None)), ClientCall(OpenLease())
    for request in (GetUsageRequest(until=day), GetUsageRequest(since=day)):
        with pytest.raises(InvalidRequest, match=day):
            asyncio.run(service.get_usage(request, root))
    assert not asyncio.run(service.get_usage(GetUsageRequest(until="2000-01-01"), root)).days
    service.close()


def test_a_tenant_sees_its_own_days() -> None:
    books = UsageBooks(None)
    for tenant in ("ann", "bob"):
        books.count(tenant, REQUEST)
    service = UsageService(books)

    def ask(caller: Tenant, tenant: str = "") -> list[str]:
        request = GetUsageRequest(tenant=tenant)
        answer = asyncio.run(service.get_usage(request, ClientCall(OpenLease(caller))))
        return [day.tenant for day in answer.days]

    ann, root = Tenant("ann"), Tenant("root", is_admin=True)
    assert ask(ann) == ask(ann, "ann") == ["ann"]
    with pytest.raises(PermissionDenied):
        ask(ann, "bob")
    assert ask(root) == ["ann", "bob"]
    assert ask(root, "bob") == ["bob"]
    service.close()


def test_odd_days_are_refused(channel: grpc.Channel) -> None:
    admin = AdminStub(channel)
    for since, word in (("yesterday", "'yesterday'"), ("2001-01-01", "1000 days")):
        request = GetUsageRequest(since=since)
        status, sentence = failure(partial(admin.GetUsage, request))
        assert status == "INVALID_ARGUMENT" and word in sentence
    assert not admin.GetUsage(GetUsageRequest(since="2030-01-01", until="2030-01-02")).days


def test_the_commands_show_tables_and_csv(cluster: tuple[Decoder, Gateway]) -> None:
    days = [
        DayUsage(tenant="ann", day="2026-11-23", requests=2, prompt_tokens=5000, output_tokens=7),
        DayUsage(tenant="bob", day="2026-11-24", requests=1, prompt_tokens=9, saved_prefill_s=1.25),
    ]
    shown = io.StringIO()
    console = Console(file=shown, width=100)
    usage_commands.print_table(days, console)
    usage_commands.print_table([], console)
    text = shown.getvalue()
    assert "5,000" in text and "5,009" in text and "1.2 s" in text and "Nothing" in text
    written = io.StringIO()
    usage_commands.write_csv(days, written)
    (first, second) = csv.DictReader(io.StringIO(written.getvalue()))
    assert (first["tenant"], first["day"], first["prompt_tokens"]) == ("ann", "2026-11-23", "5000")
    assert float(second["saved_prefill_s"]) == 1.25
    with Client(f"127.0.0.1:{cluster[1].port}") as client:
        assert [day.tenant for day in client.usage()] == ["default"]
