"""A model's chat template, rendered so that no message can inject control tokens.

The control tokens in the template's source are replaced by marks, which no message can contain.
Everything between the marks of the rendered text is plain text, even if it looks like a control
token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from cluster.errors import InvalidRequest
from engine.text.chat_messages import (
    ChatMessage,
    TemplateObject,
    ToolDefinition,
    to_template_messages,
    to_template_tools,
)

# Unpaired surrogates, which `check_text` refuses in messages
MARK = "\udc00"  # on both sides of a control token's id
ANSWER = "\udc01"  # in place of an answer whose token ids are known


class ChatTemplate:
    """The chat template of one model, as its files give it."""

    def __init__(
        self, hf_tokenizer: Any, control_ids: Mapping[str, int], control_token: re.Pattern[str]
    ) -> None:
        """Mark the control tokens in the template's source.

        Args:
            hf_tokenizer: A transformers tokenizer, with or without a chat template.
            control_ids: The ids of the control tokens, by their texts.
            control_token: Matches any of these texts.
        """
        self._hf = hf_tokenizer
        self._control_ids = control_ids
        source = hf_tokenizer.get_chat_template() if hf_tokenizer.chat_template else None
        self._source: str | None = source and control_token.sub(lambda m: self.mark(m[0]), source)
        self._variables = self._marked_variables()

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[ToolDefinition] = (),
        thinking: bool = False,
    ) -> str:
        """Render a conversation up to the beginning of the model's answer, control tokens marked.

        Raises:
            InvalidRequest: A message or tool is malformed, or the template can't express it.
        """
        return self._render(to_template_messages(messages), to_template_tools(tools), thinking)

    def render_after(
        self,
        messages: Sequence[ChatMessage],
        num_known: int,
        call_close: str,
        tools: Sequence[ToolDefinition] = (),
        thinking: bool = False,
    ) -> str | None:
        """Render only what follows the last of the first `num_known` messages, an answer.

        Args:
            messages: The whole conversation.
            num_known: How many messages are known; the last of them is the model's.
            call_close: The control token that ends a tool call.
            tools: The tools that the conversation may use.
            thinking: True to let the model think.

        Returns:
            What `render` would give after that answer; None if the template drops the answer or
            writes it twice.
        """
        converted = to_template_messages(messages)
        answer = converted[num_known - 1]
        converted[num_known - 1] = _with_answer_mark(answer)
        _, *after = self._render(converted, to_template_tools(tools), thinking).split(ANSWER)
        if len(after) != 1:
            return None
        if "tool_calls" not in answer:
            return after[0]
        if call_close not in self._control_ids:
            return None
        _, _, after_call = after[0].partition(self.mark(call_close))
        return after_call or None

    def mark(self, control_token: str) -> str:
        """Return the text that stands for a control token in rendered conversations."""
        return f"{MARK}{self._control_ids[control_token]}{MARK}"

    def _render(
        self, messages: list[TemplateObject], tools: list[TemplateObject], thinking: bool
    ) -> str:
        if self._source is None:
            raise InvalidRequest("This model has no chat template; ask for a completion instead.")
        if tools and not self._reads("tools"):
            raise InvalidRequest("This model's chat template does not support tools.")
        if thinking and not self._reads("enable_thinking"):
            raise InvalidRequest("This model's chat template does not support thinking.")
        try:
            text: str = self._hf.apply_chat_template(
                messages,
                tools=tools or None,
                chat_template=self._source,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=thinking,
                **self._variables,
            )
        except (TemplateError, TypeError, ValueError, RecursionError) as error:
            reason = str(error).replace(MARK, "").replace(ANSWER, "")
            raise InvalidRequest(f"The chat template refuses the messages: {reason}") from error
        return text

    def _marked_variables(self) -> dict[str, str]:
        """The marks of `bos_token` and of the other variables that hold a control token."""
        variables: dict[str, Any] = self._hf.special_tokens_map
        return {
            name: self.mark(token)
            for name, token in variables.items()
            if isinstance(token, str) and token in self._control_ids
        }

    def _reads(self, variable: str) -> bool:
        return re.search(rf"\b{variable}\b", self._source or "") is not None


def _with_answer_mark(message: TemplateObject) -> TemplateObject:
    """The message with ANSWER at its end: in place of its text, or in its last call."""
    if "tool_calls" not in message:
        return {"role": message["role"], "content": ANSWER}
    *calls, last = message["tool_calls"]
    last = {**last, "function": {**last["function"], "arguments": {"answer": ANSWER}}}
    return {"role": message["role"], "content": "", "tool_calls": [*calls, last]}
