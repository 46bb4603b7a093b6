"""A model's chat template, rendered so that only its own control tokens count.

The control tokens in the template's source are replaced by marks; what is between marks in the
rendered text is plain text, whoever wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from cluster.errors import InvalidRequest
from engine.text.chat_messages import Turn

MARK = "\udc00"  # half a surrogate pair: no character, so no text that a user sends can hold it
ANSWER = "\udc01"  # the same; stands in a rendered conversation for an answer that is known as ids


class ChatTemplate:
    """What a model's files say about conversations."""

    def __init__(
        self, hf_tokenizer: Any, control_ids: Mapping[str, int], control_token: re.Pattern[str]
    ) -> None:
        """`control_token` matches any of the tokens in `control_ids`."""
        self._hf = hf_tokenizer
        self._control_ids = control_ids
        source = hf_tokenizer.get_chat_template() if hf_tokenizer.chat_template else None
        self._source: str | None = source and control_token.sub(lambda m: self.mark(m[0]), source)
        self._variables = self._marked_variables()

    def render(
        self, turns: Sequence[Turn], tools: Sequence[Turn] = (), thinking: bool = False
    ) -> str:
        """The conversation up to where the model's answer begins, BOS written, control tokens
        marked. Raises InvalidRequest for what the template can't express.
        """
        if self._source is None:
            raise InvalidRequest("This model has no chat template; ask for a completion instead.")
        if tools and not self._reads("tools"):
            raise InvalidRequest("This model's chat template knows no tools.")
        if thinking and not self._reads("enable_thinking"):
            raise InvalidRequest("This model's chat template can't switch thinking on.")
        try:
            text: str = self._hf.apply_chat_template(
                turns,
                tools=list(tools) or None,
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

    def render_after(
        self,
        turns: Sequence[Turn],
        num_known: int,
        call_close: str,
        tools: Sequence[Turn] = (),
        thinking: bool = False,
    ) -> str | None:
        """What `render` gives after the last of the first `num_known` turns, an answer; None where
        the template leaves that out, or writes it twice. `call_close` is the token after a call.
        """
        turns = list(turns)
        answer = turns[num_known - 1]
        turns[num_known - 1] = _as_answer(answer)
        _, *after = self.render(turns, tools, thinking).split(ANSWER)
        if len(after) != 1:
            return None
        if "tool_calls" not in answer:
            return after[0]
        if call_close not in self._control_ids:
            return None
        _, _, after_call = after[0].partition(self.mark(call_close))
        return after_call or None

    def mark(self, control_token: str) -> str:
        return f"{MARK}{self._control_ids[control_token]}{MARK}"

    def _marked_variables(self) -> dict[str, str]:
        """`bos_token` and the other variables by which a template may write a control token."""
        variables: dict[str, Any] = self._hf.special_tokens_map
        return {
            name: self.mark(token)
            for name, token in variables.items()
            if isinstance(token, str) and token in self._control_ids
        }

    def _reads(self, variable: str) -> bool:
        return re.search(rf"\b{variable}\b", self._source or "") is not None


def _as_answer(turn: Turn) -> Turn:
    """The turn with ANSWER at its end: in place of its text, or in its last call."""
    if "tool_calls" not in turn:
        return {"role": turn["role"], "content": ANSWER}
    *calls, last = turn["tool_calls"]
    last = {**last, "function": {**last["function"], "arguments": {"answer": ANSWER}}}
    return {"role": turn["role"], "content": "", "tool_calls": [*calls, last]}
