"""Threads that tenants share: nobody's calls wait for another tenant's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from cluster.errors import Overloaded
from deployments.gateway.calls.tenant_threads import TenantThreads


@pytest.fixture
def go_on() -> Iterator[threading.Event]:
    """What the calls of a test wait for."""
    event = threading.Event()
    yield event
    event.set()


def make() -> TenantThreads:
    return TenantThreads("a test", num_threads=3, num_each=2, max_waiting=5)


def test_a_call_passes_on_what_it_is_given_and_returns_or_raises() -> None:
    async def ask() -> None:
        threads = make()
        assert await threads.run("ann", int, "ff", base=16) == 255
        with pytest.raises(ValueError):
            await threads.run("ann", int, "x")

    asyncio.run(ask())


def test_a_tenants_calls_leave_a_thread_to_others(go_on: threading.Event) -> None:
    async def ask() -> None:
        threads = make()
        held = [asyncio.ensure_future(threads.run("ann", go_on.wait, 10)) for _ in range(7)]
        await asyncio.sleep(0.05)
        assert await asyncio.wait_for(threads.run("bob", int, "1"), 5) == 1
        with pytest.raises(Overloaded, match="5 calls of the tenant ann"):
            await threads.run("ann", int, "1")
        go_on.set()
        assert await asyncio.gather(*held) == [True] * 7

    asyncio.run(ask())


def test_a_call_that_was_given_up_keeps_its_thread_until_it_ends(go_on: threading.Event) -> None:
    async def ask() -> None:
        threads = make()
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(threads.run("ann", go_on.wait, 10), 0.05)
        late = asyncio.ensure_future(threads.run("ann", int, "1"))
        await asyncio.sleep(0.05)
        assert not late.done()
        assert await asyncio.wait_for(threads.run("bob", int, "2"), 5) == 2
        go_on.set()
        assert await late == 1

    asyncio.run(ask())


def test_a_call_that_was_given_up_while_it_waited_is_never_made(go_on: threading.Event) -> None:
    async def ask() -> None:
        threads, made = make(), list[int]()
        held = [asyncio.ensure_future(threads.run("ann", go_on.wait, 10)) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(threads.run("ann", made.append, 1), 0.05)
        go_on.set()
        await asyncio.gather(*held)
        await threads.run("ann", made.append, 2)
        assert made == [2]

    asyncio.run(ask())
