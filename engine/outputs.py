"""What the engine returns: a RequestOutput for each request after each step, and EngineStats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.errors import BrioletteError
from cluster.spec import AttentionKind
from engine.request import FinishReason, Request
from engine.sampler import TokenLogprobs
from engine.scheduling.policy import TenantShare
from engine.scheduling.prefix_loader import PrefixCacheStats
from engine.text.dialect import AnswerDelta
from engine.text.tool_calls import ToolCallDelta


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What is new of one request after a step. The one with a finish_reason is its last."""

    request_id: str
    new_token_ids: list[int]
    text: str  # what the new tokens add to the text; empty without a tokenizer
    thought: str  # what they add to the thought
    tool_calls: list[ToolCallDelta]
    logprobs: list[TokenLogprobs] | None  # one per new token where the request asked for them
    finish_reason: FinishReason | None
    error: str | None  # a sentence, with FinishReason.ERROR
    error_status: str | None  # the gRPC status code's name that goes with it
    num_prompt_tokens: int
    num_output_tokens: int
    num_thought_tokens: int  # of the output
    num_cached_tokens: int  # of the prompt (of a resumed request: and its output), not computed
    num_fetched_tokens: int  # of these, those that only the block store had
    matched_stop: str | int | None  # the stop string or stop token id; None at the end of sequence


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's gauges of now, and its counters since the start."""

    num_waiting: int
    num_running: int
    num_free_blocks: Mapping[AttentionKind, int]  # unused or cached
    num_used_blocks: Mapping[AttentionKind, int]
    num_cached_blocks: Mapping[AttentionKind, int]  # of the free ones, those that can be found
    num_steps: int  # counter
    num_prefill_tokens: int  # counter; recomputed ones too
    num_decode_tokens: int  # counter
    num_preemptions: int  # counter
    num_evicted_blocks: Mapping[AttentionKind, int]  # counter
    prefix_stats: Mapping[str, PrefixCacheStats]  # counters, by tenant
    fair_share: Mapping[str, TenantShare]  # by tenant; empty without fair share


@dataclass(frozen=True, slots=True)
class NewTokens:
    """The tokens that a step sampled for one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None  # one per token where the request asked for them


def make_output(
    request: Request,
    *,
    new: NewTokens | None = None,
    delta: AnswerDelta,
    matched_stop: str | int | None = None,
    error: BrioletteError | None = None,
) -> RequestOutput:
    """Put what is new of a request together with what is known of it by now.

    Args:
        request: The request, in its present state.
        new: Its new tokens; None: no new ones.
        delta: What they add to the answer.
        matched_stop: The stop string or stop token id that ended it.
        error: What ended it.
    """
    new = new or NewTokens()
    return RequestOutput(
        request_id=request.request_id,
        new_token_ids=new.token_ids,
        text=delta.text,
        thought=delta.thought,
        tool_calls=delta.tool_calls,
        logprobs=new.logprobs,
        finish_reason=request.finish_reason,
        error=None if error is None else str(error),
        error_status=None if error is None else error.status,
        num_prompt_tokens=len(request.prompt_ids),
        num_output_tokens=len(request.output_ids),
        num_thought_tokens=request.num_thought_tokens,
        num_cached_tokens=request.num_cached_tokens,
        num_fetched_tokens=request.num_fetched_tokens,
        matched_stop=matched_stop,
    )
