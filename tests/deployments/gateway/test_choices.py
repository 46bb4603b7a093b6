"""Several answers to one call: charged together, before any of them begins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from cluster.errors import BrioletteError, InvalidRequest, QuotaExceeded, Unavailable
from cluster.tenants.quota import Quota
from cluster.tenants.tenancy import Tenant
from deployments.gateway.calls.answers import Prepared
from deployments.gateway.calls.call import Call
from deployments.gateway.calls.choices import generate_all
from protos.briolette.v1.inference_pb2 import CompleteRequest, Generation, Sampling, TokenIds
from protos.briolette.v1.stream_pb2 import Add

PIECE = Generation(text="ab", token_ids=[1, 2])


class ScriptedAnswers:
    """In place of `Answers`: the first prompt is ready at once, each further one later."""

    def __init__(self, script: Sequence[Generation | BrioletteError] = (PIECE,)) -> None:
        self.script = script  # of every answer
        self.begun: list[tuple[str, Add]] = []
        self.num_preparing = 0

    async def prepare(self, request: CompleteRequest, _: Call) -> Prepared:
        prompt_ids = list(request.token_ids.ids)
        self.num_preparing += 1
        try:
            await asyncio.sleep(0.02 * prompt_ids[0])
        finally:
            self.num_preparing -= 1
        if len(prompt_ids) == 1:
            raise InvalidRequest("One token is no prompt.")
        return Prepared(Add(sampling=Sampling(seed=7)), prompt_ids)

    async def answer(self, prepared: Prepared, call: Call) -> AsyncGenerator[Generation, None]:
        self.begun.append((call.request_id, prepared.add))
        for step in self.script:
            if isinstance(step, BrioletteError):
                raise step
            yield step


class Caller:
    """A tenant with 100 tokens a minute, on a clock that stands still."""

    def __init__(self) -> None:
        tenant = Tenant("ann", tokens_per_minute=100, max_in_flight=1)
        self.quota = Quota(tenant, lambda: 0.0)

    def ask(self, answers: Any, lengths: Sequence[int], num_choices: int) -> list[int]:
        """Whose pieces have come, for prompts of so many tokens."""
        requests = [
            CompleteRequest(token_ids=TokenIds(ids=[i] * length))
            for i, length in enumerate(lengths)
        ]
        call = Call(self.quota, request_id="call")

        async def take() -> list[int]:
            pieces = generate_all(answers, requests, call, num_choices)
            return [index async for index, _ in pieces]

        return asyncio.run(take())

    def check_left(self, num_tokens: int) -> None:
        """Of the minute."""
        self.quota.charge(num_tokens)
        with pytest.raises(QuotaExceeded):
            self.quota.charge(1)


@pytest.fixture
def caller() -> Caller:
    return Caller()


def test_a_prompt_is_charged_once_and_every_answer(caller: Caller) -> None:
    answers = ScriptedAnswers()
    assert sorted(caller.ask(answers, [30, 20], 3)) == list(range(6))
    caller.check_left(100 - 50 - 6 * 2)


def test_the_decoder_is_told_what_answers_share(caller: Caller) -> None:
    answers = ScriptedAnswers()
    caller.ask(answers, [3, 2], 2)
    told = [(id_, add.same_call, add.same_prompt) for id_, add in answers.begun]
    assert told == [
        ("call-0", False, False),
        ("call-1", True, True),
        ("call-2", True, False),
        ("call-3", True, True),
    ]


@pytest.mark.parametrize("lengths", [[120], [60, 60]])
def test_none_begins_of_a_call_that_is_refused(caller: Caller, lengths: list[int]) -> None:
    """Also where the first prompt alone would fit, and the second one is ready later."""
    answers = ScriptedAnswers()
    with pytest.raises(InvalidRequest, match="120 tokens"):
        caller.ask(answers, lengths, 8)
    assert not answers.begun
    caller.check_left(100)


def test_a_prompt_that_is_wrong_ends_all_before_they_begin(caller: Caller) -> None:
    answers = ScriptedAnswers()
    with pytest.raises(InvalidRequest, match="no prompt"):
        caller.ask(answers, [30, 1, 30, 30], 2)
    assert not answers.begun and not answers.num_preparing
    caller.check_left(100)


def test_what_could_not_begin_is_given_back_whole(caller: Caller) -> None:
    for _ in range(3):
        with pytest.raises(Unavailable):
            caller.ask(ScriptedAnswers([Unavailable("It is away.")]), [40, 40], 2)
    caller.check_left(100)


def test_what_has_begun_is_not_given_back(caller: Caller) -> None:
    with pytest.raises(Unavailable):
        caller.ask(ScriptedAnswers([PIECE, Unavailable("It is gone.")]), [40], 2)
    caller.check_left(100 - 40 - 2 * 2)
