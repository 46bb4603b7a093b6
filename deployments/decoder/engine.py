"""What the decoder's side needs of engine.core.EngineCore."""

from __future__ import annotations

from typing import Protocol

from deployments.decoder.session_memory import SessionEngine
from engine.outputs import EngineStats, RequestOutput
from engine.prefill_meter import PrefillMeter
from engine.request import FinishReason, Request, SamplingParams
from engine.text.grammars import Grammars


class Engine(SessionEngine, Protocol):
    """Between two steps it takes and gives up requests, in the thread that steps it."""

    @property
    def grammars(self) -> Grammars | None: ...
    @property
    def has_work(self) -> bool: ...
    @property
    def prefill_meter(self) -> PrefillMeter: ...
    @property
    def waits_for_blocks(self) -> bool: ...
    def add(
        self,
        *,
        request_id: str,
        prompt_ids: list[int],
        sampling: SamplingParams,
        seed: int | None = None,
        tenant: str = "default",
        session: str | None = None,
        weight: float = 1.0,
        priority: int = 0,
        arrived_at: float | None = None,
        deadline_at: float | None = None,
        chat: bool = False,
    ) -> Request: ...
    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> object: ...
    def step(self) -> list[RequestOutput]: ...
    def stats(self) -> EngineStats: ...
    def held_bytes(self, request: Request) -> int: ...
