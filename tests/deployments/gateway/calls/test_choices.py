"""Several answers to one call: charged together, before any of them begins."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from cluster.errors import InvalidRequest, QuotaExceeded, Unavailable
from cluster.tenants.quota import Quota
from cluster.tenants.tenancy import Tenant
from deployments.gateway.calls.client_call import ClientCall
from deployments.gateway.calls.remote_decoder import DecoderRequest
from protos.briolette.v1.inference_pb2 import (
    FINISH_REASON_LENGTH,
    CompleteRequest,
    Generation,
    Sampling,
    TokenIds,
)
from protos.briolette.v1.stream_pb2 import Add
from tests.support.gateway.scripted_backend import Script, ScriptedBackend

PIECE = Generation(text="ab", token_ids=[1, 2])
LAST = Generation(text="ab", token_ids=[1, 2], finish_reason=FINISH_REASON_LENGTH)


class SlowBackend(ScriptedBackend):
    """The first prompt is prepared at once, each further one later."""

    num_preparing = 0

    def __init__(self, script: Script = (LAST,)) -> None:
        super().__init__(script)

    async def prepare(self, request: Any, _call: ClientCall, _turn: object) -> DecoderRequest:
        prompt_ids = list(request.token_ids.ids)
        self.num_preparing += 1
        try:
            await asyncio.sleep(0.02 * prompt_ids[0])
        finally:
            self.num_preparing -= 1
        if len(prompt_ids) == 1:
            raise InvalidRequest("One token is no prompt.")
        return DecoderRequest(Add(sampling=Sampling(seed=7)), prompt_ids)


class Caller:
    """A tenant with 100 tokens a minute, on a clock that stands still."""

    def __init__(self) -> None:
        tenant = Tenant("ann", tokens_per_minute=100, max_in_flight=1)
        self.quota = Quota(tenant, lambda: 0.0)

    def ask(self, backend: SlowBackend, lengths: Sequence[int], num_choices: int) -> list[int]:
        """Answers whose pieces have come, for prompts of so many tokens."""
        requests = [
            CompleteRequest(token_ids=TokenIds(ids=[i] * length))
            for i, length in enumerate(lengths)
        ]
        call = ClientCall(self.quota, request_id="call")

        async def take() -> list[int]:
            async with backend.inference().generate(requests, call, num_choices) as stream:
                return [index async for index, _ in stream]

        return asyncio.run(take())

    def check_left(self, num_tokens: int) -> None:
        """Check that exactly so many tokens of the minute are left."""
        self.quota.charge(num_tokens)
        with pytest.raises(QuotaExceeded):
            self.quota.charge(1)


@pytest.fixture
def caller() -> Caller:
    return Caller()


def test_a_prompt_is_charged_once_and_every_answer(caller: Caller) -> None:
    backend = SlowBackend()
    assert sorted(caller.ask(backend, [30, 20], 3)) == list(range(6))
    caller.check_left(100 - 50 - 6 * 2)


def test_the_decoder_is_told_what_answers_share(caller: Caller) -> None:
    backend = SlowBackend()
    caller.ask(backend, [3, 2], 2)
    told = [(add.request_id, add.same_call, add.same_prompt) for add in backend.adds]
    assert told == [
        ("call-0", False, False),
        ("call-1", True, True),
        ("call-2", True, False),
        ("call-3", True, True),
    ]


@pytest.mark.parametrize("lengths", [[120], [60, 60]])
def test_none_begins_of_a_call_that_is_refused(caller: Caller, lengths: list[int]) -> None:
    """Also where the first prompt alone would fit, and the second one is ready later."""
    backend = SlowBackend()
    with pytest.raises(InvalidRequest, match="120 tokens"):
        caller.ask(backend, lengths, 8)
    assert not backend.adds
    caller.check_left(100)


def test_a_prompt_that_is_wrong_ends_all_before_they_begin(caller: Caller) -> None:
    backend = SlowBackend()
    with pytest.raises(InvalidRequest, match="no prompt"):
        caller.ask(backend, [30, 1, 30, 30], 2)
    assert not backend.adds and not backend.num_preparing
    caller.check_left(100)


def test_what_could_not_begin_is_given_back_whole(caller: Caller) -> None:
    for _ in range(3):
        with pytest.raises(Unavailable):
            caller.ask(SlowBackend([Unavailable("It is away.")]), [40, 40], 2)
    caller.check_left(100)


def test_what_has_begun_is_not_given_back(caller: Caller) -> None:
    with pytest.raises(Unavailable):
        caller.ask(SlowBackend([PIECE, Unavailable("It is gone.")]), [40], 2)
    caller.check_left(100 - 40 - 2 * 2)
