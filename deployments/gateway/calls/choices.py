"""Several answers to one call, at once: begun, streamed and cancelled together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from cluster.errors import DeadlineExceeded
from deployments.gateway.calls.answers import Answers, Prepared
from deployments.gateway.calls.call import Call
from deployments.gateway.calls.charging import charged
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
    """None begins before all are checked and charged: a call that is refused costs nothing."""
    with call.lease:
        prepared = await _prepare_all(answers, requests, call)
        with charged(call, sum(len(prompt_ids) for _, prompt_ids in prepared)) as owe:
            async with aclosing(_run_all(answers, prepared, call, num_choices, owe)) as pieces:
                async for piece in pieces:
                    yield piece


async def _prepare_all(
    answers: Answers, requests: Sequence[Request], call: Call
) -> Sequence[Prepared]:
    tasks = [asyncio.ensure_future(answers.prepare(request, call)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


async def _run_all(
    answers: Answers,
    prepared: Sequence[Prepared],
    call: Call,
    num_choices: int,
    owe: Callable[[Generation], None],
) -> AsyncGenerator[Piece, None]:
    """Each in a task of its own; they wait for whoever takes the pieces."""
    num_running = len(prepared) * num_choices
    ready: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(num_running)

    async def run(index: int) -> None:
        request = for_choice(prepared[index // num_choices], index, num_choices)
        own = replace(call, request_id=f"{call.request_id}-{index}")
        try:
            async with aclosing(answers.answer(request, own)) as pieces:
                async for piece in pieces:
                    owe(piece)
                    await ready.put((index, piece))
            await ready.put(None)
        except Exception as error:  # for whoever takes the pieces
            await ready.put(error)

    tasks = [asyncio.ensure_future(run(index)) for index in range(num_running)]
    try:
        while num_running:
            item = await ready.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item
    finally:
        await _cancel(tasks)


async def _cancel(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def for_choice(prepared: Prepared, index: int, num_choices: int) -> Prepared:
    """For one of a call's answers: the choices of a prompt have seeds of their own, and the first
    one the request's.
    """
    choice, add = index % num_choices, Add()
    add.CopyFrom(prepared.add)
    add.same_call, add.same_prompt = index > 0, choice > 0
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
