"""Several answers to one call, at once: begun, streamed and cancelled together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from cluster.errors import DeadlineExceeded
from deployments.calls.answers import Answers
from deployments.calls.call import Call
from deployments.calls.charging import CallLease, NextChoiceLease
from protos.briolette.v1.inference_pb2 import ChatRequest, CompleteRequest, Generation

GRACE_S = 1.0  # the decoder notices a deadline first, while it is well

T = TypeVar("T")
Request = ChatRequest | CompleteRequest
Piece = tuple[int, Generation]


async def generate_all(
    answers: Answers, requests: Sequence[Request], call: Call, num_choices: int
) -> AsyncGenerator[Piece, None]:
    """(index of the request, piece) as they come; leaving early aborts all of them. Each prompt has
    `num_choices` requests, one after another.

    The first error of any ends all. Raises DeadlineExceeded also where the decoder is silent.
    """
    pieces = (
        _one(answers, requests[0], call)
        if len(requests) == 1
        else _all(answers, requests, call, num_choices)
    )
    async with aclosing(pieces):
        while (piece := await _in_time(anext(pieces, None), call)) is not None:
            yield piece


async def _one(answers: Answers, request: Request, call: Call) -> AsyncGenerator[Piece, None]:
    async with aclosing(answers.generate(request, call)) as pieces:
        async for piece in pieces:
            yield 0, piece


async def _all(
    answers: Answers, requests: Sequence[Request], call: Call, num_choices: int
) -> AsyncGenerator[Piece, None]:
    """Each in a task of its own; they wait for whoever takes the pieces."""
    first, following = CallLease(call.lease), NextChoiceLease(call.lease)
    ready: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(len(requests))

    async def run(index: int, request: Request) -> None:
        lease = following if index % num_choices else first
        own = replace(call, request_id=f"{call.request_id}-{index}", lease=lease)
        try:
            async with aclosing(answers.generate(request, own)) as pieces:
                async for piece in pieces:
                    await ready.put((index, piece))
            await ready.put(None)
        except Exception as error:  # for whoever takes the pieces
            await ready.put(error)

    with call.lease:
        tasks = [asyncio.ensure_future(run(i, request)) for i, request in enumerate(requests)]
        try:
            num_running = len(tasks)
            while num_running:
                item = await ready.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    num_running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _in_time(piece: Awaitable[T], call: Call) -> T:
    if call.timeout_s is None:
        return await piece
    try:
        async with asyncio.timeout((call.time_remaining_s or 0.0) + GRACE_S):
            return await piece
    except TimeoutError:
        raise DeadlineExceeded("The deadline passed before the answer was complete.") from None
