"""SchedulerOutput: one step as the scheduler plans it."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

from engine.request import Request


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """A request's part of a step."""

    request: Request
    _: KW_ONLY
    start: int  # the position of its first new token
    num_new_tokens: int
    samples: bool  # the step reaches its last known token, so that a new one is sampled
    is_decode: bool  # one token beyond the prompt; for counting only

    @property
    def stop(self) -> int:
        """The position behind its last new token."""
        return self.start + self.num_new_tokens


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step: what to compute, in the batch's order, and which requests were preempted for it."""

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(item.num_new_tokens for item in self.scheduled)

    @property
    def prefill_chunks(self) -> list[tuple[int, int]]:
        """Positions [start, stop) of each prompt chunk."""
        return [(item.start, item.stop) for item in self.scheduled if not item.is_decode]

    @property
    def sampling(self) -> list[Request]:
        """Requests that get a new token, in the order of the batch's logits."""
        return [item.request for item in self.scheduled if item.samples]
