"""OpenAI's requests as ours: one message for each prompt, of which all its answers are made."""

from __future__ import annotations

import json
from collections.abc import Sequence

from cluster.errors import InvalidField
from deployments.gateway.openai.schema import (
    MAX_CHOICES,
    ChatBody,
    ChatMessage,
    ChosenTool,
    CompletionBody,
    ContentPart,
    ResponseFormat,
    SamplingFields,
    ToolField,
)
from protos.briolette.v1 import inference_pb2
from protos.briolette.v1.inference_pb2 import (
    ChatRequest,
    CompleteRequest,
    Message,
    Sampling,
    TokenIds,
    Tool,
    ToolCall,
)

COMPLETION_TOKENS = 16  # of a completion that names no number, as OpenAI has it
TOOL_CHOICES = {
    "auto": inference_pb2.TOOL_CHOICE_AUTO,
    "none": inference_pb2.TOOL_CHOICE_NONE,
    "required": inference_pb2.TOOL_CHOICE_REQUIRED,
}


def to_chat_request(body: ChatBody) -> ChatRequest:
    """Raises InvalidField for what can't be done here."""
    _refuse_in_chat(body)
    request = ChatRequest(
        model=body.model,
        messages=map(_message, body.messages),
        sampling=_chat_sampling(body),
        tools=map(_tool, body.tools),
        thinking=_thinks(body),
        priority=body.priority,
    )
    _set_tool_choice(request, body)
    return request


def to_complete_requests(body: CompletionBody) -> list[CompleteRequest]:
    """One request per prompt. Raises InvalidField for what can't be done here."""
    _refuse_in_completion(body)
    prompts, sampling = _prompts(body), _plain_sampling(body)
    if len(prompts) * body.n > MAX_CHOICES:
        raise InvalidField(f"At most {MAX_CHOICES} answers at once, of all prompts.", "n")
    requests = []
    for prompt in prompts:
        request = CompleteRequest(model=body.model, sampling=sampling, priority=body.priority)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.CopyFrom(TokenIds(ids=prompt))
        requests.append(request)
    return requests


def _chat_sampling(body: ChatBody) -> Sampling:
    sampling = _sampling(body)
    if body.max_completion_tokens is not None:
        sampling.max_tokens = body.max_completion_tokens
    if body.logprobs:
        sampling.logprobs = body.top_logprobs
    elif body.top_logprobs:
        raise InvalidField("top_logprobs needs logprobs set to true.", "top_logprobs")
    _set_format(sampling, body.response_format)
    return sampling


def _plain_sampling(body: CompletionBody) -> Sampling:
    sampling = _sampling(body)
    if body.max_tokens is None:
        sampling.max_tokens = COMPLETION_TOKENS
    if body.logprobs is not None:
        sampling.logprobs = body.logprobs
    return sampling


def _sampling(body: SamplingFields) -> Sampling:
    if body.logit_bias:
        raise InvalidField("logit_bias can't be had here.", "logit_bias")
    return Sampling(
        temperature=body.temperature,
        top_k=None if body.top_k == -1 else _positive(body.top_k, "top_k"),
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        stop=[body.stop] if isinstance(body.stop, str) else body.stop,
        stop_token_ids=body.stop_token_ids,
        max_tokens=body.max_tokens,
        seed=None if body.seed is None else body.seed % 2**63,
        ignore_eos=body.ignore_eos,
    )


def _positive(number: int | None, name: str) -> int | None:
    if number is not None and number < 1:
        raise InvalidField(f"{name} must be at least 1, or -1 for all.", name)
    return number


def _set_format(sampling: Sampling, wanted: ResponseFormat) -> None:
    if wanted.type == "json_object":
        sampling.json_object = True
    elif wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise InvalidField("json_schema is missing.", "response_format.json_schema")
        sampling.json_schema = json.dumps(wanted.json_schema.schema_)


def _thinks(body: ChatBody) -> bool:
    """vLLM's switch counts before OpenAI's; without either the model doesn't think."""
    switch = body.chat_template_kwargs.enable_thinking
    return body.reasoning_effort != "none" if switch is None else switch


def _set_tool_choice(request: ChatRequest, body: ChatBody) -> None:
    choice = body.tool_choice
    if isinstance(choice, ChosenTool):
        request.tool_choice = inference_pb2.TOOL_CHOICE_REQUIRED
        request.required_tool = choice.function.name
    else:
        request.tool_choice = TOOL_CHOICES[choice]


def _tool(tool: ToolField) -> Tool:
    function = tool.function
    parameters = "" if function.parameters is None else json.dumps(function.parameters)
    return Tool(name=function.name, description=function.description, parameters=parameters)


def _message(message: ChatMessage) -> Message:
    return Message(
        role=message.role,
        content=_text(message.content),
        thought=message.reasoning_content,
        tool_calls=[
            ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in message.tool_calls
        ],
        tool_call_id=message.tool_call_id,
    )


def _text(content: str | Sequence[ContentPart]) -> str:
    if isinstance(content, str):
        return content
    for part in content:
        if part.type not in ("text", "refusal"):
            raise InvalidField(f"Only text can be read here, no {part.type}.", "messages")
    return "".join(part.text or part.refusal for part in content)


def _prompts(body: CompletionBody) -> Sequence[str | Sequence[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidField("The prompt is empty.", "prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt


def _refuse_in_chat(body: ChatBody) -> None:
    if body.functions:
        raise InvalidField("functions is an older form; use tools.", "functions")
    if any(kind != "text" for kind in body.modalities):
        raise InvalidField("Answers are text only here.", "modalities")


def _refuse_in_completion(body: CompletionBody) -> None:
    if body.echo:
        raise InvalidField("echo can't be had here: put the prompt before the answer.", "echo")
    if body.suffix:
        raise InvalidField("This model can't fill in before a suffix.", "suffix")
    if body.best_of > body.n:
        raise InvalidField("best_of above n can't be had here; ask for more with n.", "best_of")
