"""Request: what was asked for, how to sample it, and its state and progress in the engine."""

from __future__ import annotations

import enum
import time
from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, dataclass, field

from cluster.errors import InvalidRequest
from engine.spans import MediaSpan
from engine.text.grammar import JSON_OBJECT, Grammar, GrammarKind
from engine.text.guide import Guide

Owner = tuple[str, str] | None  # of checkpoints: tenant and session; None: no session

MAX_STOPS, MAX_STOP_CHARS = 16, 1000
MAX_STOP_TOKEN_IDS = 128


class FinishReason(enum.Enum):
    """Why a request ended: every accepted request ends with exactly one of these."""

    STOP = "stop"  # a stop token or a stop string
    TOOL_CALLS = "tool_calls"  # a stop token after tool calls, all of them complete
    LENGTH = "length"  # max_tokens, or the context is full
    ABORT = "abort"  # the client cancelled or disconnected
    DEADLINE = "deadline"  # the client's deadline expired
    ERROR = "error"  # something failed; the output carries a message


class RequestState(enum.Enum):
    """The states of a request, in the order of its life."""

    WAITING = "waiting"  # in the queue, holds no blocks
    WAITING_FOR_BLOCKS = "waiting_for_blocks"  # in the queue, while a store fetches its KV blocks
    RUNNING = "running"  # holds blocks and a row of the block tables
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose a request's tokens; by default from the model's plain distribution.

    Raises:
        InvalidRequest: A value is out of range; the message names the field.
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None  # None keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # 1 is off; over prompt and output
    presence_penalty: float = 0.0  # over the output
    frequency_penalty: float = 0.0  # over the output
    seed: int | None = None  # None draws one at arrival
    logprobs: int | None = None  # number of alternatives beside the chosen token; None is off
    stop: Sequence[str] = ()
    stop_token_ids: Collection[int] = frozenset()  # beside the model's own end-of-sequence ids
    max_tokens: int | None = None  # None: up to the end of the context
    ignore_eos: bool = False  # for benchmarks: generate past end-of-sequence ids
    # The format of the answer's text, at most one of these; thoughts are unconstrained
    json_schema: str | None = None
    json_object: bool = False
    regex: str | None = None
    lark: str | None = None

    def __post_init__(self) -> None:
        checks = (
            (0 <= self.temperature <= 100, "temperature must be between 0 and 100"),
            (self.top_k is None or self.top_k >= 1, "top_k must be at least 1"),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (0 <= self.min_p <= 1, "min_p must be between 0 and 1"),
            (0 < self.repetition_penalty <= 100, "repetition_penalty must be above 0, at most 100"),
            (-2 <= self.presence_penalty <= 2, "presence_penalty must be between -2 and 2"),
            (-2 <= self.frequency_penalty <= 2, "frequency_penalty must be between -2 and 2"),
            (self.seed is None or 0 <= self.seed < 2**63, "seed must be between 0 and 2^63 - 1"),
            (self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs must be 0 to 20"),
            (self.max_tokens is None or self.max_tokens >= 1, "max_tokens must be at least 1"),
        )
        for holds, sentence in checks:
            if not holds:  # NaN fails every comparison, so it is refused here too
                raise InvalidRequest(f"{sentence}.")
        self._bound_stops()
        self._check_format()

    @property
    def grammar(self) -> Grammar | None:
        """The format that constrains the answer's text; None: there is none."""
        if self.json_object:
            return JSON_OBJECT
        kinds: tuple[GrammarKind, ...] = ("json_schema", "regex", "lark")
        for kind in kinds:
            if (text := getattr(self, kind)) is not None:
                return Grammar(kind, text)
        return None

    def _check_format(self) -> None:
        given = (self.json_schema, self.json_object or None, self.regex, self.lark)
        if sum(item is not None for item in given) > 1:
            raise InvalidRequest("Give one of json_schema, json_object, regex and lark.")
        if (grammar := self.grammar) is not None:
            if self.ignore_eos:
                raise InvalidRequest("ignore_eos is not supported in an answer with a format.")
            grammar.check_size()

    def _bound_stops(self) -> None:
        """Check the number and size of stops, since every token is compared with all of them.

        They are counted before they are copied: a caller may have sent millions.
        """
        if len(self.stop) > MAX_STOPS:
            raise InvalidRequest(f"At most {MAX_STOPS} stop strings.")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(f"At most {MAX_STOP_TOKEN_IDS} stop_token_ids.")
        if not all(0 < len(text) <= MAX_STOP_CHARS for text in self.stop):
            raise InvalidRequest(f"A stop string must have 1 to {MAX_STOP_CHARS} characters.")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", frozenset(self.stop_token_ids))


@dataclass(slots=True, eq=False, weakref_slot=True)
class Request:
    """One sequence in the engine.

    `num_computed_tokens` is its only progress number: the tokens whose keys and values are in the
    KV cache. Prefill and decode differ only in how many tokens are still to be computed.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    seed: int
    _: KW_ONLY
    max_tokens: int  # resolved against the context length
    tenant: str = "default"
    session: str | None = None  # the kept session of which this is a turn
    spans: Sequence[MediaSpan] = ()  # media of the prompt, in order
    weight: float = 1.0  # of its tenant in the fair share
    priority: int = 0  # among its tenant's requests; higher goes first
    output_ids: list[int] = field(default_factory=list)  # may start filled: a resumed request
    arrived_at: float = field(default_factory=time.monotonic)
    deadline_at: float | None = None  # on time.monotonic's clock; None: never
    guide: Guide | None = None  # follows its grammar
    state: RequestState = RequestState.WAITING
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # of these, found cached at the first start
    num_fetched_tokens: int = 0  # of the cached ones, those that only the store had
    num_charged_tokens: int = 0  # charged by the policy, each position once
    block_hashes: list[bytes] = field(default_factory=list)  # of its full blocks
    num_preemptions: int = 0
    asks_store: bool = False  # preempted: what was cached for it may be evicted by now
    finish_reason: FinishReason | None = None
    num_thought_tokens: int = 0  # of the output
    num_lasting_tokens: int | None = None  # with which its session goes on; None: all

    @property
    def owner(self) -> Owner:
        """The owner of its checkpoints: its session, if it has one."""
        return None if self.session is None else (self.tenant, self.session)

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens known but not yet in the KV cache; 1 for a request that decodes."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        """True once the request has ended."""
        return self.state is RequestState.FINISHED

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Return the tokens at positions [start, stop), across prompt and output."""
        num_prompt = len(self.prompt_ids)
        prompt_part = self.prompt_ids[start:stop] if start < num_prompt else []
        return prompt_part + self.output_ids[max(0, start - num_prompt) : max(0, stop - num_prompt)]
