"""What OpenAI's clients send: the fields that count here. Others are ignored.

Ranges are checked by the engine (`SamplingParams`), for both dialects.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

MAX_CHOICES = 128  # answers to one request
MAX_ITEMS = 4096  # of a list in a request, token ids apart

T = TypeVar("T")

# The first bad item ends the check: an error for each would take seconds.
Ids = Annotated[list[T], Field(fail_fast=True)]
Items = Annotated[list[T], Field(fail_fast=True, max_length=MAX_ITEMS)]

U32 = Annotated[int, Field(ge=0, lt=2**32)]
I32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
I64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Fields(BaseModel):
    """A JSON object in a request; a field that is null counts as absent."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class StreamOptions(Fields):
    """Options of a stream."""

    include_usage: bool = False


class SamplingFields(Fields):
    """What chat and completions have in common."""

    model: str = ""  # the one that is served
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    max_tokens: U32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: I64 | None = None
    stop: str | Items[str] = []
    logit_bias: dict[str, Any] = {}  # refused unless empty

    # Not of OpenAI.
    top_k: I32 | None = None  # -1 keeps all
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: Ids[U32] = []
    ignore_eos: bool = False
    priority: I32 = 0


class ContentPart(Fields):
    """A part of a message."""

    type: str
    text: str = ""
    refusal: str = ""


class CalledFunction(Fields):
    """What an assistant has called."""

    name: str
    arguments: str = ""


class CallField(Fields):
    """A call in an assistant's message."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Fields):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[ContentPart] = ""
    reasoning_content: str = ""
    tool_calls: Items[CallField] = []
    tool_call_id: str = ""


class FunctionField(Fields):
    """What the model may call."""

    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None


class ToolField(Fields):
    """A tool."""

    type: Literal["function"]
    function: FunctionField


class ChosenFunction(Fields):
    """Its name."""

    name: str


class ChosenTool(Fields):
    """The tool that must be called."""

    type: Literal["function"]
    function: ChosenFunction


class SchemaField(Fields):
    """A schema with a name; `strict` makes no difference, every schema is kept to."""

    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(Fields):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaField | None = None


class TemplateArguments(Fields):
    """Arguments of the chat template; vLLM's clients turn thinking on with them."""

    enable_thinking: bool | None = None


class ChatBody(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Items[ChatMessage]
    max_completion_tokens: U32 | None = None
    logprobs: bool = False
    top_logprobs: U32 = 0
    tools: Items[ToolField] = []
    tool_choice: Literal["none", "auto", "required"] | ChosenTool = "auto"
    parallel_tool_calls: bool = True
    response_format: ResponseFormat = ResponseFormat(type="text")
    reasoning_effort: str = "none"
    chat_template_kwargs: TemplateArguments = TemplateArguments()
    modalities: Items[str] = ["text"]
    functions: Items[Any] = []  # refused: the older form of tools


def _kind(prompt: Any) -> str:
    """Which of a prompt's forms to hold it to, so that only one is tried."""
    if not isinstance(prompt, list):
        return "text"
    first = prompt[0] if prompt else ""
    return "texts" if isinstance(first, str) else "id_lists" if isinstance(first, list) else "ids"


class CompletionBody(SamplingFields):
    """POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[Items[str], Tag("texts")]
        | Annotated[Ids[U32], Tag("ids")]
        | Annotated[Items[Ids[U32]], Tag("id_lists")],
        Discriminator(_kind),
    ]
    logprobs: U32 | None = None
    echo: bool = False  # refused
    suffix: str = ""  # refused
    best_of: U32 = 1  # refused above n
