"""Our answers in OpenAI's form, whole or in chunks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from deployments.gateway.openai.objects import (
    AnswerMessage,
    AnswerToolCall,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    Function,
    TokenLogprob,
    TopLogprob,
    UsageField,
)
from protos.briolette.v1 import inference_pb2
from protos.briolette.v1.inference_pb2 import Generation, ToolCallPiece

FINISH_REASONS: dict[int, FinishReason] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}
LEAST_LOGPROB = -9999.0  # JSON has no infinity


class _Answer:
    """What the objects of one answer have in common."""

    kind: str  # begins the id

    def __init__(self, request_id: str, model: str, token_bytes: Callable[[int], bytes]) -> None:
        self._request_id = request_id
        self._id = f"{self.kind}-{request_id}"
        self._model = model
        self._created = int(time.time())
        self._token_bytes = token_bytes


class ChatAnswer(_Answer):
    """Makes the objects of one answer to a chat."""

    kind = "chatcmpl"

    def __init__(self, request_id: str, model: str, token_bytes: Callable[[int], bytes]) -> None:
        super().__init__(request_id, model, token_bytes)
        self._begun: set[int] = set()

    def whole(self, answers: Sequence[Generation], usage: UsageField) -> ChatCompletion:
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [self._choice(i, answer) for i, answer in enumerate(answers)],
            "usage": usage,
        }

    def chunk(self, index: int, piece: Generation) -> ChatChunk:
        """What is new of one choice."""
        delta: AnswerMessage = {}
        if index not in self._begun:
            self._begun.add(index)
            delta["role"] = "assistant"
        if piece.thought:
            delta["reasoning_content"] = piece.thought
        if piece.text or "role" in delta:
            delta["content"] = piece.text
        if piece.tool_calls:
            delta["tool_calls"] = [self._call_delta(index, call) for call in piece.tool_calls]
        choice: ChatChunkChoice = {
            "index": index,
            "delta": delta,
            "finish_reason": FINISH_REASONS.get(piece.finish_reason),
            "logprobs": self._logprobs(piece),
        }
        return self._chunk([choice])

    def last(self, usage: UsageField) -> ChatChunk:
        """What ends a stream of which the usage was wanted."""
        return self._chunk([]) | {"usage": usage}

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _choice(self, index: int, answer: Generation) -> ChatChoice:
        calls = [self._call(index, call) for call in answer.tool_calls]
        message: AnswerMessage = {
            "role": "assistant",
            "content": answer.text if answer.text or not calls else None,
            "refusal": None,
        }
        if answer.thought:
            message["reasoning_content"] = answer.thought
        if calls:
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "finish_reason": FINISH_REASONS[answer.finish_reason],
            "logprobs": self._logprobs(answer),
        }

    def _call(self, choice: int, call: ToolCallPiece) -> AnswerToolCall:
        function: Function = {"name": call.name, "arguments": call.arguments}
        return {"id": self._call_id(choice, call), "type": "function", "function": function}

    def _call_delta(self, choice: int, piece: ToolCallPiece) -> AnswerToolCall:
        delta: AnswerToolCall = {"index": piece.index, "function": {"arguments": piece.arguments}}
        if piece.id:
            delta["id"], delta["type"] = self._call_id(choice, piece), "function"
            delta["function"]["name"] = piece.name
        return delta

    def _call_id(self, choice: int, call: ToolCallPiece) -> str:
        """Ours are unique in an answer, but clients keep those of a whole conversation in a map."""
        return f"call_{self._request_id}_{choice}_{call.index}"

    def _logprobs(self, piece: Generation) -> ChatLogprobs | None:
        if not piece.logprobs:
            return None
        content: list[TokenLogprob] = []
        for token_id, token in zip(piece.token_ids, piece.logprobs, strict=True):
            others = [self._top(other.token_id, other.logprob) for other in token.alternatives]
            chosen = self._top(token_id, token.logprob)
            content.append({**chosen, "top_logprobs": others})
        return {"content": content, "refusal": None}

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        data = self._token_bytes(token_id)
        return {
            "token": data.decode("utf-8", "replace"),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(data),
        }


class CompletionAnswer(_Answer):
    """Makes the objects of one answer to a completion, whole or in chunks."""

    kind = "cmpl"

    def __init__(self, request_id: str, model: str, token_bytes: Callable[[int], bytes]) -> None:
        super().__init__(request_id, model, token_bytes)
        self._offsets: dict[int, int] = {}  # characters of each choice's tokens so far

    def whole(self, answers: Sequence[Generation], usage: UsageField) -> Completion:
        choices = [self._choice(i, answer) for i, answer in enumerate(answers)]
        return self._completion(choices) | {"usage": usage}

    def chunk(self, index: int, piece: Generation) -> Completion:
        """What is new of one choice."""
        return self._completion([self._choice(index, piece)])

    def last(self, usage: UsageField) -> Completion:
        """What ends a stream of which the usage was wanted."""
        return self._completion([]) | {"usage": usage}

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _choice(self, index: int, piece: Generation) -> CompletionChoice:
        return {
            "index": index,
            "text": piece.text,
            "finish_reason": FINISH_REASONS.get(piece.finish_reason),
            "logprobs": self._logprobs(index, piece),
        }

    def _logprobs(self, index: int, piece: Generation) -> CompletionLogprobs | None:
        if not piece.logprobs:
            return None
        made: CompletionLogprobs = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token_id, token in zip(piece.token_ids, piece.logprobs, strict=True):
            text = self._token_bytes(token_id).decode("utf-8", "replace")
            made["tokens"].append(text)
            made["token_logprobs"].append(max(token.logprob, LEAST_LOGPROB))
            made["top_logprobs"].append(
                {other.text: max(other.logprob, LEAST_LOGPROB) for other in token.alternatives}
            )
            made["text_offset"].append(self._offsets.setdefault(index, 0))
            self._offsets[index] += len(text)
        return made


def to_usage(lasts: Sequence[Generation], num_choices: int) -> UsageField:
    """Sum the usage of all answers from their last pieces; `num_choices` of them share a prompt."""
    prompt_tokens = sum(last.usage.prompt_tokens for last in lasts[::num_choices])
    output_tokens = sum(last.usage.output_tokens for last in lasts)
    cached_tokens = sum(last.usage.cached_tokens for last in lasts[::num_choices])
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": sum(last.usage.thought_tokens for last in lasts)
        },
    }
