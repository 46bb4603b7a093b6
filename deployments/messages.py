"""The engine's types as protobuf messages, and back."""

from __future__ import annotations

from typing import Any

from cluster.placement import ExpertGroups
from cluster.store.kv_store import StoreStatus
from engine.outputs import EngineStats, RequestOutput
from engine.request import FinishReason, SamplingParams
from engine.sampler import TokenLogprobs
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


def to_sampling_params(sampling: Sampling) -> SamplingParams:
    """The wire's fields as the engine's. Raises InvalidRequest for a value out of range."""
    given: dict[str, Any] = {
        field.name: value for field, value in sampling.ListFields() if field.has_presence
    }
    return SamplingParams(
        **given,
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
    )


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
