"""What `briolette verify` asks: a set of prompts for any model, or those of a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeGuard

from cluster.errors import ConfigError
from engine.text.tokenizer import Tokenizer

LONG_TOKENS = 4096  # of the longest prompt, or four windows where that is more
SYSTEM = (
    "You help the people of a small library. You answer in one or two sentences, you name the "
    "shelf where a book stands if you know it, and you say so if you don't know something. The "
    "library opens at nine and closes at six; on Sundays it is closed."
)
# Three: where prompts part is known, and kept, when the second one came.
QUESTIONS = ("When do you open?", "Where is Moby Dick?", "Who wrote Emma?")
SENTENCES = (
    "the train was late again, and nobody could say why",
    "she opened the window and looked at the river",
    "a loaf of bread costs more than it did last year",
    "the committee will meet in the small room upstairs",
    "he forgot his umbrella, so we waited until the rain was over",
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of a user, each asked after the model's answers to those before; or one raw prompt."""

    turns: Sequence[str] = ()
    system: str | None = None
    token_ids: Sequence[int] = ()  # the raw prompt

    @property
    def num_prompts(self) -> int:
        return len(self.turns) or 1

    def prompt(self, tokenizer: Tokenizer, answers: Sequence[str]) -> list[int]:
        """Token ids of the prompt that follows these answers.

        Raises InvalidRequest for a conversation that the model's chat template can't express.
        """
        if self.token_ids:
            return list(self.token_ids)
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn, answer in zip(self.turns, answers, strict=False):
            messages.append({"role": "user", "content": turn})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": self.turns[len(answers)]})
        return tokenizer.apply_chat_template(messages)


@dataclass(frozen=True, slots=True)
class Case:
    """Conversations that one engine sees one after the other."""

    name: str
    conversations: Sequence[Conversation]


def shipped_cases(
    tokenizer: Tokenizer, *, window: int, block_size: int, chunk: int, longest: int
) -> list[Case]:
    """Prompts around the borders at which an engine could go wrong; sizes are tokens.

    `chunk` is the token budget of a step, `longest` what a prompt may have at most.
    """
    text = tokenizer.encode(_text(tokenizer, longest))

    def around(length: int) -> list[Conversation]:
        lengths = (length - 1, length, length + 1)
        return [Conversation(token_ids=text[:n]) for n in lengths if 1 <= n <= longest]

    long = min(max(LONG_TOKENS, 4 * window), longest)
    cases = [
        Case("short", [Conversation(["What is the capital of Norway?"])]),
        Case("around a block", around(block_size)),
        Case("around the window", around(window)),
        Case("around a step's budget", around(chunk)),
        Case("many turns", [Conversation(["My name is Anna.", "What is 2 + 3?", "Who am I?"])]),
        Case("shared system prompt", [Conversation([turn], SYSTEM) for turn in QUESTIONS]),
        Case("long", [Conversation(token_ids=text[:long])]),
    ]
    return [case for case in cases if case.conversations]


def read_cases(path: Path, tokenizer: Tokenizer) -> list[Case]:
    """One conversation a line, as JSON: {"turns": ["…", "…"], "system": "…"} or {"prompt": "…"}.

    Raises ConfigError that names the line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"{path} can't be read: {reason}.") from None
    cases = [
        Case(f"line {number}", [_conversation(line, f"{path}, line {number}", tokenizer)])
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not cases:
        raise ConfigError(f"{path} has no prompt.")
    return cases


def _conversation(line: str, where: str, tokenizer: Tokenizer) -> Conversation:
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON: {error}.") from None
    if isinstance(entry, dict):
        prompt, turns, system = (entry.get(key) for key in ("prompt", "turns", "system"))
        if entry.keys() == {"prompt"} and isinstance(prompt, str) and prompt:
            return Conversation(token_ids=tokenizer.encode(prompt))
        has_system = isinstance(system, str | None)
        if entry.keys() <= {"turns", "system"} and _are_texts(turns) and has_system:
            return Conversation(turns, system)
    raise ConfigError(
        f'{where} must be {{"turns": ["…"], "system": "…"}}, where system may be left out, or '
        '{"prompt": "…"}.'
    )


def _are_texts(turns: object) -> TypeGuard[list[str]]:
    return isinstance(turns, list) and bool(turns) and all(isinstance(t, str) for t in turns)


def _text(tokenizer: Tokenizer, num_tokens: int) -> str:
    """Numbered sentences, none like another, of at least so many tokens."""
    sentences = _numbered()
    text = ""
    while len(tokenizer.encode(text)) < num_tokens:
        text += "".join(next(sentences) for _ in range(max(16, len(text) // 64)))
    return text


def _numbered() -> Iterator[str]:
    for number in count(1):
        yield f"{number}. In the morning, {SENTENCES[number % len(SENTENCES)]}. "
