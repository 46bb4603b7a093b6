"""What OpenAI's clients are sent, as types: checked here, published in /openapi.json."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

FinishReason = Literal["stop", "length", "tool_calls"]


class Function(TypedDict):
    name: NotRequired[str]
    arguments: str


class AnswerToolCall(TypedDict):
    """A tool call, or in a chunk what is new of one."""

    index: NotRequired[int]  # in chunks
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: Function


class AnswerMessage(TypedDict):
    """An assistant's message, or in a chunk what is new of it."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[AnswerToolCall]]
    refusal: NotRequired[None]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class PromptDetails(TypedDict):
    cached_tokens: int


class OutputDetails(TypedDict):
    reasoning_tokens: int


class UsageField(TypedDict):
    """Tokens of a whole answer, each prompt counted once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: OutputDetails


class ChatChoice(TypedDict):
    index: int
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None


class ChatChunkChoice(TypedDict):
    index: int
    delta: AnswerMessage
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None


class CompletionChoice(TypedDict):
    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: CompletionLogprobs | None


class ChatCompletion(TypedDict):
    """The answer to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageField


class ChatChunk(TypedDict):
    """An event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[UsageField | None]


class Completion(TypedDict):
    """The answer to POST /v1/completions, and an event of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[UsageField | None]


class ModelCard(TypedDict):
    """A model that is served."""

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int


class ModelList(TypedDict):
    """All models that are served."""

    object: str
    data: list[ModelCard]
