"""Threads for calls that block, of which no tenant takes more than its part."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

from cluster.errors import Overloaded

P = ParamSpec("P")
T = TypeVar("T")


class TenantThreads:
    """Runs calls of one kind. What one tenant's calls wait for delays no other tenant's."""

    def __init__(self, name: str, num_threads: int, num_each: int, max_waiting: int) -> None:
        """A tenant has `num_each` of them; `max_waiting` of its calls may wait for one."""
        self._name = name
        self._num_each = num_each
        self._max_waiting = max_waiting
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._seats: WeakValueDictionary[str, _Seats] = WeakValueDictionary()

    async def run(self, tenant: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `call` returns. Raises Overloaded, and what it raises."""
        seats = self._seats.get(tenant)
        if seats is None:
            seats = self._seats[tenant] = _Seats(self._num_each)
        if seats.num_waiting >= self._max_waiting:
            raise Overloaded(
                f"{seats.num_waiting} calls of the tenant {tenant} wait for {self._name} already; "
                "try again later."
            )
        await seats.take()
        future = self._executor.submit(call, *args, **kwargs)
        # Not before it has ended, even where nobody waits for it any more.
        future.add_done_callback(partial(_give_back, seats, asyncio.get_running_loop()))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Begin no more calls."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class _Seats(asyncio.Semaphore):
    """One tenant's part of the threads."""

    num_waiting = 0

    async def take(self) -> None:
        self.num_waiting += 1
        try:
            await self.acquire()
        finally:
            self.num_waiting -= 1


def _give_back(seats: _Seats, loop: asyncio.AbstractEventLoop, _: object) -> None:
    with suppress(RuntimeError):  # the gateway has ended meanwhile
        loop.call_soon_threadsafe(seats.release)
