"""A tokenizer with all of Gemma 4's control tokens, a small chat template in its format, and a
model that says what a script says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from engine.batch import Batch
from engine.text.tokenizer import Tokenizer

CONTROL_TOKENS = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>",
    "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>",
    "std_token": "<|tool>",
    "etd_token": "<tool|>",
    "escape_token": '<|"|>',
    "think_token": "<|think|>",
}
# Pieces longer than a byte, so that parts of the format are cut in odd places
PIECES = ["call:", "thought", "{c", 'a"', "}}", ":4", "th", "the"]
MERGES = [("t", "h"), ("th", "e")]

# The format of the released templates: tools and <|think|> in the system's turn; calls, what they
# brought and the answer in one turn of the model's; thoughts only between calls of the last turn;
# with thinking off, an empty thought; with thinking on, an open one after what a tool brought.
TEMPLATE = """\
{%- macro quoted(text) -%}{{ '<|"|>' + text + '<|"|>' }}{%- endmacro -%}
{%- macro value(v) -%}
    {%- if v is string -%}{{ quoted(v) }}
    {%- elif v is boolean -%}{{ 'true' if v else 'false' }}
    {%- elif v is mapping -%}{ {{- members(v) -}} }
    {%- elif v is iterable -%}
        [{%- for item in v -%}{{ value(item) }}{{ ',' if not loop.last }}{%- endfor -%}]
    {%- else -%}{{ v }}
    {%- endif -%}
{%- endmacro -%}
{%- macro members(object) -%}
    {%- for key, v in object | dictsort -%}
        {{ key }}:{{ value(v) }}{{ ',' if not loop.last }}
    {%- endfor -%}
{%- endmacro -%}
{%- macro thoughtless(text) -%}
    {%- for part in text.split('<channel|>') -%}{{ part.split('<|channel>')[0] }}{%- endfor -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set system = messages[0] if messages[0]['role'] in ['system', 'developer'] -%}
{%- if system or tools or enable_thinking -%}
    {{- '<|turn>system\\n' -}}
    {{- '<|think|>\\n' if enable_thinking -}}
    {{- system['content'] | trim if system -}}
    {%- for tool in tools or [] -%}
        {%- set function = tool['function'] -%}
        <|tool>declaration:{{ function['name'] }}
        {{- '{description:' + quoted(function['description']) -}}
        {%- if function['parameters'] -%},parameters:{{ value(function['parameters']) }}
        {%- endif -%}
        }<tool|>
    {%- endfor -%}
    {{- '<turn|>\\n' -}}
{%- endif -%}
{%- set turns = messages[1:] if system else messages -%}
{%- set state = namespace(last_user=-1, before='', is_open=false, is_answered=false) -%}
{%- for m in turns -%}
    {%- if m['role'] == 'user' -%}{%- set state.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in turns -%}{%- if m['role'] != 'tool' -%}
    {%- set index = loop.index0 -%}
    {%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}
    {%- if not (role == 'model' and state.before == 'model') -%}
        {{- '<|turn>' + role + '\\n' -}}
    {%- endif -%}
    {%- if m['reasoning'] and m['tool_calls'] and index > state.last_user -%}
        {{- '<|channel>thought\\n' + m['reasoning'] + '\\n<channel|>' -}}
    {%- endif -%}
    {%- set results = namespace(any=false, follow=m['tool_calls']) -%}
    {%- for call in m['tool_calls'] or [] -%}
        {{- '<|tool_call>call:' + call['function']['name'] + '{' -}}
        {{- members(call['function']['arguments']) + '}<tool_call|>' -}}
    {%- endfor -%}
    {%- for result in turns[index + 1:] -%}
        {%- set results.follow = results.follow and result['role'] == 'tool' -%}
        {%- if results.follow -%}
            {%- set results.any = true -%}
            <|tool_response>response:{{ result['name'] }}{value:{{ value(result['content']) }}}
            {{- '<tool_response|>' -}}
        {%- endif -%}
    {%- endfor -%}
    {%- set content = thoughtless(m['content']) if role == 'model' else m['content'] -%}
    {{- content | trim -}}
    {%- set state.is_open = m['tool_calls'] and not (results.any and content | trim) -%}
    {%- if state.is_open and not results.any -%}{{- '<|tool_response>' -}}
    {%- elif not state.is_open -%}{{- '<turn|>\\n' -}}
    {%- endif -%}
    {%- set state.before = role -%}
    {%- set state.is_answered = results.any -%}
{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if not state.is_open -%}
        {{- '<|turn>model\\n' -}}
        {{- '<|channel>thought\\n<channel|>' if not enable_thinking -}}
    {%- elif state.is_answered and enable_thinking -%}
        {{- '<|channel>thought\\n' -}}
    {%- endif -%}
{%- endif -%}
"""


def backend(special: Sequence[str] = tuple(CONTROL_TOKENS.values())) -> Backend:
    """Bytes are tokens, and some pieces; the control tokens come first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*CONTROL_TOKENS.values(), *alphabet, *PIECES]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    made = Backend(models.BPE(vocab=vocab, merges=MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(special))
    return made


def hf_wrap(made: Backend, names: Mapping[str, str], template: str = TEMPLATE) -> Any:
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    fast.chat_template = template
    return fast


def hf_tokenizer(template: str = TEMPLATE) -> Any:
    return hf_wrap(backend(), CONTROL_TOKENS, template)


def make_tokenizer(template: str = TEMPLATE) -> Tokenizer:
    return Tokenizer(hf_tokenizer(template))


def spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of what a model wrote, control tokens as such."""
    return tokenizer.encode(text, add_bos=False)


class ScriptedRunner:
    """Says what `play` gave, in the next request. Where a grammar forbids that, comes the allowed
    token with the lowest id.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.play([])

    def play(self, script: Sequence[int]) -> None:
        self._script = list(script)
        self._start: int | None = None  # position before the answer

    def execute(self, batch: Batch) -> Tensor:
        logits = -0.01 * torch.arange(self._vocab_size).repeat(len(batch.logits_indices), 1)
        for row, index in enumerate(batch.logits_indices.tolist()):
            position = int(batch.positions[index])
            if self._start is None:
                self._start = position
            said = position - self._start
            logits[row, self._script[said] if said < len(self._script) else 0] = 50.0
        return logits
