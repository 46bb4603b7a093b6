"""The engine's types as protobuf messages, and back."""

from __future__ import annotations

from cluster.placement import ExpertGroups
from cluster.store.kv_store import StoreStatus
from engine.outputs import EngineStats, RequestOutput
from engine.request import FinishReason, SamplingParams
from engine.sampler import TokenLogprobs
from engine.text.grammar import JSON_OBJECT, Grammar
from experts.stats import ExpertLoad
from protos.briolette.v1 import inference_pb2
from protos.briolette.v1.admin_pb2 import EngineLoad, GroupLoad, KvBlocks, KvStore
from protos.briolette.v1.inference_pb2 import (
    Alternative,
    Generation,
    Sampling,
    Timings,
    ToolCallPiece,
    Usage,
)
from protos.briolette.v1.stream_pb2 import Failure, Output

GATEWAY_HELLO = b"briolette gateway"  # with which a gateway greets the decoder
DECODER_WELCOME = b"briolette decoder"
SEND_DEADLINE_S = 2.0  # a gateway or decoder that takes nothing for so long is treated as gone

FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.TOOL_CALLS: inference_pb2.FINISH_REASON_TOOL_CALLS,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
ENDS_WITHOUT_ANSWER = {
    FinishReason.ABORT: ("CANCELLED", "The request was cancelled."),
    FinishReason.DEADLINE: (
        "DEADLINE_EXCEEDED",
        "The deadline passed before the answer was complete.",
    ),
}


DEFAULTS = SamplingParams()


def to_sampling_params(sampling: Sampling) -> SamplingParams:
    """Convert sampling parameters. Raises InvalidRequest for a value out of range."""
    has = sampling.HasField
    return SamplingParams(
        temperature=sampling.temperature if has("temperature") else DEFAULTS.temperature,
        top_k=sampling.top_k if has("top_k") else None,
        top_p=sampling.top_p if has("top_p") else DEFAULTS.top_p,
        min_p=sampling.min_p if has("min_p") else DEFAULTS.min_p,
        repetition_penalty=(
            sampling.repetition_penalty
            if has("repetition_penalty")
            else DEFAULTS.repetition_penalty
        ),
        presence_penalty=sampling.presence_penalty,  # 0 where it isn't set, and so is the default
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed if has("seed") else None,
        logprobs=sampling.logprobs if has("logprobs") else None,
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
        max_tokens=sampling.max_tokens if has("max_tokens") else None,
        ignore_eos=sampling.ignore_eos,
        json_schema=sampling.json_schema if has("json_schema") else None,
        json_object=sampling.json_object,
        regex=sampling.regex if has("regex") else None,
        lark=sampling.lark if has("lark") else None,
    )


def to_grammar(sampling: Sampling) -> Grammar | None:
    """Return the format that the answer's text must have; None for any text."""
    kind = sampling.WhichOneof("format")
    if kind is None or kind == "json_object":
        return JSON_OBJECT if sampling.json_object else None
    return Grammar(kind, getattr(sampling, kind))


def to_output(output: RequestOutput, queue_s: float, saved_prefill_s: float) -> Output:
    """What a step brought for one request, for its gateway."""
    reason = output.finish_reason
    if reason is FinishReason.ERROR:
        failure = Failure(
            status=output.error_status or "INTERNAL", sentence=output.error or "The step failed."
        )
        return Output(request_id=output.request_id, failure=failure)
    if reason in ENDS_WITHOUT_ANSWER:
        status, sentence = ENDS_WITHOUT_ANSWER[reason]
        return Output(
            request_id=output.request_id, failure=Failure(status=status, sentence=sentence)
        )
    piece = Generation(
        text=output.text,
        thought=output.thought,
        tool_calls=[
            ToolCallPiece(index=call.index, id=call.id, name=call.name, arguments=call.arguments)
            for call in output.tool_calls
        ],
        token_ids=output.new_token_ids,
    )
    if output.logprobs is not None:
        piece.logprobs.extend(map(_to_logprobs, output.logprobs))
    if reason is not None:
        piece.finish_reason = FINISH_REASONS[reason]
        piece.matched_stop = output.matched_stop if isinstance(output.matched_stop, str) else ""
        piece.usage.CopyFrom(
            Usage(
                prompt_tokens=output.num_prompt_tokens,
                output_tokens=output.num_output_tokens,
                cached_tokens=output.num_cached_tokens,
                fetched_tokens=output.num_fetched_tokens,
                thought_tokens=output.num_thought_tokens,
                saved_prefill_s=saved_prefill_s,
            )
        )
        piece.timings.CopyFrom(Timings(queue_s=queue_s))
    return Output(request_id=output.request_id, generation=piece)


def to_load(stats: EngineStats) -> EngineLoad:
    """The engine's numbers for the status."""
    return EngineLoad(
        num_waiting=stats.num_waiting,
        num_running=stats.num_running,
        prefill_tokens=stats.num_prefill_tokens,
        decode_tokens=stats.num_decode_tokens,
        preemptions=stats.num_preemptions,
        kv_blocks=[
            KvBlocks(
                group=kind.name.lower(),
                used=used,
                total=used + stats.num_free_blocks[kind],
                cached=stats.num_cached_blocks[kind],
                evicted=stats.num_evicted_blocks[kind],
            )
            for kind, used in stats.num_used_blocks.items()
        ],
        prefix_queries=sum(use.num_queries for use in stats.prefix_stats.values()),
        prefix_hits=sum(use.num_hits for use in stats.prefix_stats.values()),
        cached_tokens=sum(use.num_cached_tokens for use in stats.prefix_stats.values()),
    )


def to_group_load(load: ExpertLoad, groups: ExpertGroups) -> list[GroupLoad]:
    """By group, over all layers."""
    by_expert = load.total.sum(0)
    return [
        GroupLoad(
            group_id=group_id, choices=int(by_expert[list(groups.experts_of(group_id))].sum())
        )
        for group_id in range(groups.num_groups)
    ]


def to_kv_store(status: StoreStatus) -> KvStore:
    return KvStore(
        address=status.address,
        up=status.is_up,
        writable=status.is_writable,
        used_bytes=status.used_bytes,
        max_bytes=status.max_bytes,
        queue_bytes=status.queue_bytes,
        fetched=status.num_decided["fetch"],
        recomputed=status.num_decided["recompute"],
    )


def _to_logprobs(token: TokenLogprobs) -> inference_pb2.TokenLogprobs:
    return inference_pb2.TokenLogprobs(
        logprob=token.logprob,
        alternatives=[
            Alternative(token_id=token_id, logprob=logprob)
            for token_id, logprob in token.alternatives
        ],
    )
