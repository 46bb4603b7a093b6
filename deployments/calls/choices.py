"""Several answers to one call, at once: begun, streamed and cancelled together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from cluster.errors import DeadlineExceeded
from deployments.calls.answers import Answers, Prepared
from deployments.calls.call import Call
from deployments.calls.charging import CallLease, NextChoiceLease
from protos.briolette.v1.inference_pb2 import ChatRequest, CompleteRequest, Generation
from protos.briolette.v1.stream_pb2 import Add

GRACE_S = 1.0  # the decoder notices a deadline first, while it is well

SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that no two answers to a request have one seed

T = TypeVar("T")
Request = ChatRequest | CompleteRequest
Piece = tuple[int, Generation]


async def generate_all(
    answers: Answers, requests: Sequence[Request], call: Call, num_choices: int
) -> AsyncGenerator[Piece, None]:
    """(index of the answer, piece) as they come; leaving early aborts all of them. Each request has
    `num_choices` answers, one after another, and is prepared once.

    The first error of any ends all. Raises DeadlineExceeded also where the decoder is silent.
    """
    pieces = (
        _one(answers, requests[0], call)
        if len(requests) == num_choices == 1
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
    num_answers = len(requests) * num_choices
    ready: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(num_answers)

    async def run(index: int, prepared: asyncio.Future[Prepared]) -> None:
        choice = index % num_choices
        lease = following if choice else first
        own = replace(call, request_id=f"{call.request_id}-{index}", lease=lease)
        try:
            request = for_choice(await prepared, choice)
            async with aclosing(answers.answer(request, own)) as pieces:
                async for piece in pieces:
                    await ready.put((index, piece))
            await ready.put(None)
        except Exception as error:  # for whoever takes the pieces
            await ready.put(error)

    with call.lease:
        prepared = [asyncio.ensure_future(answers.prepare(request, call)) for request in requests]
        tasks = [
            asyncio.ensure_future(run(i, prepared[i // num_choices])) for i in range(num_answers)
        ]
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
            for task in (*prepared, *tasks):
                task.cancel()
            await asyncio.gather(*prepared, *tasks, return_exceptions=True)


def for_choice(prepared: Prepared, choice: int) -> Prepared:
    """For another answer: the choices have seeds of their own, and the first one the request's."""
    add = Add()
    add.CopyFrom(prepared.add)
    if add.sampling.HasField("seed"):
        add.sampling.seed = (add.sampling.seed + choice * SEED_STEP) % 2**63
    return Prepared(add, prepared.prompt_ids)


async def _in_time(piece: Awaitable[T], call: Call) -> T:
    if call.timeout_s is None:
        return await piece
    try:
        async with asyncio.timeout((call.time_remaining_s or 0.0) + GRACE_S):
            return await piece
    except TimeoutError:
        raise DeadlineExceeded("The deadline passed before the answer was complete.") from None
