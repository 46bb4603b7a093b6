"""Thoughts and tool calls in kept conversations: a tool loop goes on in its turn, thoughts go with
it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.store.redis import RedisAddress
from cluster.tenants.sessions import Sessions
from protos.briolette.v1.inference_pb2 import (
    FINISH_REASON_TOOL_CALLS,
    ChatRequest,
    Generation,
    Message,
    Sampling,
    Tool,
)
from protos.briolette.v1.sessions_pb2 import GetSessionRequest, ResumeSessionRequest
from tests.support.engine.gemma_chat import ScriptedRunner, make_tokenizer, spelled
from tests.support.gateway.requests import failure
from tests.support.gateway.session_cluster import SessionCluster, running_sessions
from tests.support.store.redis_servers import redis_server

TOKENIZER = make_tokenizer()
WEATHER = Tool(name="weather", description="The weather.", parameters='{"type": "object"}')
THOUGHT = "<|channel>thought\nI must look.\n<channel|>"
CALL = '<|tool_call>call:weather{city: <|"|>Paris<|"|>}<tool_call|>'  # with a space of its own
GREEDY = Sampling(temperature=0.0, max_tokens=100)
ASKED = Message(role="user", content="How is it in Paris?")


class Talk:
    """One session, asked in turn."""

    def __init__(self, cluster: SessionCluster, runner: ScriptedRunner, sessions: Sessions) -> None:
        self.cluster, self.runner, self.sessions = cluster, runner, sessions

    def say(self, answer: str, *messages: Message, **fields: Any) -> Generation:
        self.runner.play(spelled(TOKENIZER, answer))
        request = ChatRequest(
            messages=messages,
            session="trip",
            **{"sampling": GREEDY, "thinking": True, "tools": [WEATHER], **fields},
        )
        said: Generation = self.cluster.inference.ChatOnce(request, timeout=20)
        return said

    @property
    def kept(self) -> str:
        """What the next turn begins with."""
        token_ids = self.sessions.load("default", "trip").content["token_ids"]
        decoded: str = TOKENIZER._hf.decode(token_ids)
        return decoded

    @property
    def messages(self) -> list[Message]:
        got = self.cluster.sessions.GetSession(GetSessionRequest(name="trip"))
        return list(got.messages)


@pytest.fixture
def talk(tmp_path: Path) -> Iterator[Talk]:
    runner = ScriptedRunner(TOKENIZER.vocab_size)
    with (
        redis_server(tmp_path) as address,
        running_sessions(TOKENIZER, address, runner=runner) as cluster,
    ):
        yield Talk(cluster, runner, sessions_at(address))


def sessions_at(address: RedisAddress) -> Sessions:
    return Sessions(address, 60.0, lambda tenant: 1 << 20)


def test_a_tool_loop_goes_on_in_its_turn(talk: Talk) -> None:
    first = talk.say(f"{THOUGHT}{CALL}<|tool_response>", ASKED)
    assert first.finish_reason == FINISH_REASON_TOOL_CALLS
    assert talk.kept.endswith(THOUGHT + CALL)
    result = Message(role="tool", content="sunny", tool_call_id=first.tool_calls[0].id)
    second = talk.say("Good.\n<channel|>Sunny.<turn|>", result)
    assert second.text == "Sunny."
    # It was appended to what the model wrote, the thought between the calls too.
    brought = 'response:weather{value:<|"|>sunny<|"|>}<tool_response|><|channel>thought\n'
    so_far = first.usage.prompt_tokens + first.usage.output_tokens
    assert second.usage.prompt_tokens == so_far + len(spelled(TOKENIZER, brought))
    assert second.usage.cached_tokens >= first.usage.prompt_tokens // 16 * 16
    assert talk.kept.endswith(
        f"<|turn>model\n{CALL}"
        '<|tool_response>response:weather{value:<|"|>sunny<|"|>}<tool_response|>Sunny.'
    )
    third = talk.say("Bye.<turn|>", Message(role="user", content="Thanks."))
    assert third.text == "Bye."
    assert talk.kept.endswith("Sunny.<turn|>\n<|turn>user\nThanks.<turn|>\n<|turn>model\nBye.")


def test_a_stop_string_ends_the_answer_and_no_more(talk: Talk) -> None:
    first = talk.say(f"{THOUGHT}{CALL}<|tool_response>", ASKED)
    result = Message(role="tool", content="sunny", tool_call_id=first.tool_calls[0].id)
    stopped = Sampling(temperature=0.0, max_tokens=100, stop=["STOP"])
    second = talk.say("Good.\n<channel|>Sunny. STOP<turn|>", result, sampling=stopped)
    assert second.text == "Sunny. "
    assert talk.kept.endswith("<tool_response|>Sunny. ")


def test_what_was_said_is_shown_with_thoughts_and_calls(talk: Talk) -> None:
    first = talk.say(f"{THOUGHT}{CALL}<|tool_response>", ASKED)
    brought = Message(role="tool", content="s", tool_call_id=first.tool_calls[0].id)
    talk.say("<channel|>Sunny.<turn|>", brought)
    asked, called, result, sunny = talk.messages
    assert (asked.content, sunny.content) == (ASKED.content, "Sunny.")
    assert called.thought == "I must look."
    assert json.loads(called.tool_calls[0].arguments) == {"city": "Paris"}
    assert (result.role, result.tool_call_id) == ("tool", called.tool_calls[0].id)


def test_other_tools_or_thinking_write_the_beginning_anew(talk: Talk) -> None:
    talk.say(f"{THOUGHT}Hello.<turn|>", ASKED)
    assert "<|think|>" in talk.kept and "<|tool>" in talk.kept
    talk.say("Hello.<turn|>", ASKED, thinking=False)
    assert "<|think|>" not in talk.kept and "<|tool>" in talk.kept
    assert talk.kept.count("<|turn>model") == 2
    talk.say("Hello.<turn|>", ASKED, thinking=False, tools=[])
    assert "<|tool>" not in talk.kept


def test_an_empty_thought_stays_since_it_is_cached(talk: Talk) -> None:
    """The template writes it before the answer to switch thinking off."""
    for _ in range(2):
        talk.say("Hello.<turn|>", ASKED, thinking=False)
    assert talk.kept.count("<|turn>model\n<|channel>thought\n<channel|>Hello.") == 2


def test_a_call_that_was_cut_is_no_call(talk: Talk) -> None:
    cut = talk.say("<|tool_call>call:weather{city:<turn|>", ASKED)
    assert cut.tool_calls[0].arguments == '{"city":'
    assert not talk.messages[-1].tool_calls
    assert talk.say("Yes.<turn|>", ASKED).text == "Yes."


def test_a_result_of_no_call_leaves_the_session_as_it_was(talk: Talk) -> None:
    talk.say("Hello.<turn|>", ASKED)
    before = talk.kept
    result = Message(role="tool", content="sunny", tool_call_id="x")
    status, sentence = failure(lambda: talk.say("", result))
    assert (status, "no earlier message has made" in sentence) == ("INVALID_ARGUMENT", True)
    assert talk.kept == before


def test_resume_brings_what_the_next_turn_begins_with(talk: Talk) -> None:
    talk.say(f"{THOUGHT}Hello.<turn|>", ASKED)
    num_kept = len(talk.sessions.load("default", "trip").content["token_ids"])
    answer = talk.cluster.sessions.ResumeSession(ResumeSessionRequest(name="trip"))
    assert answer.memory_tokens + answer.store_tokens + answer.computed_tokens == num_kept
