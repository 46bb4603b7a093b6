"""EngineCore: requests in, tokens out, one step at a time. It knows no network and no processes."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from cluster.errors import BrioletteError, DeadlineExceeded, InvalidRequest
from engine.answer_streams import AnswerStreams
from engine.batch import Batch, build_batch
from engine.cache.block_hash import BlockHasher
from engine.cache.block_store import BlockStore
from engine.cache.kv_cache import KVCache, KVCacheConfig
from engine.limits import RequestLimits, SpecLimits
from engine.outputs import EngineStats, NewTokens, RequestOutput, make_output
from engine.prefill_meter import PrefillMeter
from engine.request import FinishReason, Request, SamplingParams
from engine.sampler import Sampler, SamplerOutput, TokenLogprobs
from engine.scheduling.load_shedding import LoadShedding
from engine.scheduling.policy import Policy
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.scheduler_output import SchedulerOutput
from engine.spans import MediaSpan
from engine.text.dialect import AnswerDelta
from engine.text.grammars import Grammars
from engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """Computes batches: `engine.runner.ModelRunner`, or a stand-in in a test."""

    def execute(self, batch: Batch) -> Tensor:
        """Return logits [num_logits, vocab_size] fp32 of the rows in batch.logits_indices."""


class EngineCore:
    """Runs requests to their end. Not thread-safe: add, abort and step come from one thread.

    Every request that `add` accepts ends with exactly one RequestOutput that has a finish_reason,
    returned by a `step`, whatever ends it.
    """

    def __init__(
        self,
        runner: Runner,
        kv: KVCacheConfig,
        *,
        spec_limits: SpecLimits,
        sampler: Sampler | None = None,
        policy: Policy | None = None,
        store: BlockStore | None = None,
        hasher: BlockHasher | None = None,
        checkpoint_blocks: int = 0,
        max_num_batched_tokens: int = 512,
        max_num_seqs: int = 64,
        load_shedding: LoadShedding | None = None,
        tokenizer: Tokenizer | None = None,
        prefill_meter: PrefillMeter | None = None,
    ) -> None:
        """Put an engine together.

        Args:
            runner: Computes the batches.
            kv: Sizes of the KV cache.
            spec_limits: What the engine must know of the model.
            sampler: Chooses the tokens; None: a `Sampler`.
            policy: Ranks the requests; None: first come, first served.
            store: A slower tier of KV blocks; None: there is none.
            hasher: Names the content of blocks; None: no prefix is cached.
            checkpoint_blocks: Sliding windows are checkpointed at the ends of prompts and turns,
                where prompts part, and every so many blocks (0: not there).
            max_num_batched_tokens: Tokens of one step.
            max_num_seqs: Requests of one step.
            load_shedding: Refuses requests at arrival; None: a `LoadShedding`.
            tokenizer: Without one, answers are token ids only.
            prefill_meter: Measures prefills; None: a `PrefillMeter`.

        Raises:
            NotEnoughMemory: `kv` is too small for any request.
        """
        self.runner = runner
        self.sampler = sampler or Sampler()
        self.tokenizer = tokenizer
        self.prefill_meter = prefill_meter or PrefillMeter()
        self.limits = spec_limits
        self.kv = KVCache(
            kv,
            sliding_window=spec_limits.sliding_window,
            max_num_seqs=max_num_seqs,
            max_model_len=spec_limits.max_model_len,
            hasher=hasher,
            checkpoint_blocks=checkpoint_blocks,
        )
        self.scheduler = Scheduler(
            self.kv,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            policy=policy,
            load_shedding=load_shedding,
            store=store,
        )
        self._request_limits = RequestLimits(
            spec_limits, self.kv, self.scheduler.max_num_batched_tokens
        )
        self._requests: dict[str, Request] = {}
        eos_token_ids = spec_limits.eos_token_ids
        self.grammars = None if tokenizer is None else Grammars(tokenizer, eos_token_ids)
        self._answers = AnswerStreams(tokenizer, self.grammars, eos_token_ids)
        self._outputs: list[RequestOutput] = []  # what the next `step` returns
        self._num_steps = self._num_prefill_tokens = self._num_decode_tokens = 0

    def step(self) -> list[RequestOutput]:
        """Compute one step and return what is new of its requests; [] when idle."""
        self._expire()
        output = self.scheduler.schedule()
        if output.scheduled:
            self._compute(output)
        return self._collect()

    @property
    def has_work(self) -> bool:
        """True if a step would do or return something."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._outputs)

    @property
    def waits_for_blocks(self) -> bool:
        """True if a step would only ask the block store whether it is ready."""
        return self.scheduler.waits_for_blocks and not self._outputs

    def add(
        self,
        *,
        request_id: str,
        prompt_ids: list[int],
        sampling: SamplingParams,
        output_ids: Sequence[int] = (),
        seed: int | None = None,
        tenant: str = "default",
        session: str | None = None,
        spans: Sequence[MediaSpan] = (),
        weight: float = 1.0,
        priority: int = 0,
        arrived_at: float | None = None,
        deadline_at: float | None = None,
        chat: bool = False,
    ) -> Request:
        """Accept a request. Whatever this raises, nothing of the request stays.

        Args:
            request_id: Unique among the requests that have not ended.
            prompt_ids: The prompt's tokens, at least one.
            sampling: How to choose tokens, and what ends the answer.
            output_ids: Tokens that another engine has generated for this request. Positions,
                penalties, seed and text continue as if they had been generated here; they count
                towards max_tokens and aren't returned again.
            seed: Of the sampler; None: `sampling.seed`, or a new one. A request that goes on here
                needs the one of its first engine's `Request`.
            tenant: Whose request this is, for fair share and the prefix cache.
            session: A kept session of which this is a turn: its checkpoints are found by
                `drop_session`.
            spans: Embeddings of media, which take the place of prompt tokens.
            weight: The tenant's weight in the fair share, above 0.
            priority: Higher ones go before the tenant's other requests.
            arrived_at: When it arrived, on time.monotonic's clock; None: now.
            deadline_at: When it expires, on time.monotonic's clock; None: never.
            chat: The answer has parts (thought, text, tool calls); otherwise all of it is text.

        Raises:
            InvalidRequest: The request can never be answered.
            ContextTooLong: Prompt and max_tokens exceed the context or the KV cache.
            DeadlineExceeded: The deadline has expired.
            Overloaded: Too many requests are queued, or this one would wait too long.
        """
        if request_id in self._requests:
            raise InvalidRequest(f"A request with the id {request_id!r} is already running.")
        self._request_limits.check_ids(prompt_ids, output_ids)
        if self.tokenizer is None and (sampling.stop or sampling.grammar):
            raise InvalidRequest("Stop strings and formats need a tokenizer: this engine has none.")
        if not (0 < weight < math.inf):
            raise InvalidRequest(f"weight must be a number above 0, not {weight}.")
        spans = self._request_limits.check_spans(spans, len(prompt_ids))
        now = time.monotonic()
        if deadline_at is not None and deadline_at <= now:
            raise DeadlineExceeded("The deadline expired before the request was accepted.")
        if seed is None:
            seed = random.getrandbits(63) if sampling.seed is None else sampling.seed
        request = Request(
            request_id=request_id,
            prompt_ids=list(prompt_ids),
            sampling=sampling,
            seed=seed,
            max_tokens=self._request_limits.max_tokens(len(prompt_ids), sampling.max_tokens),
            tenant=tenant,
            session=session,
            spans=spans,
            weight=weight,
            priority=priority,
            output_ids=list(output_ids),
            arrived_at=now if arrived_at is None else arrived_at,
            deadline_at=deadline_at,
        )
        with ExitStack() as undo:
            undo.callback(self._withdraw, request)
            self.scheduler.add(request)
            self._requests[request_id] = request
            self._resume(request, chat)
            undo.pop_all()
        return request

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request between two steps and free its blocks; unknown ids are ignored.

        The next step returns its last output.
        """
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, reason)

    def drop_session(self, tenant: str, session: str) -> int:
        """Free the KV blocks that are cached for this session alone; returns the bytes freed."""
        return self.kv.drop((tenant, session))

    def session_tokens(self, tenant: str) -> dict[str, int]:
        """Return for each of the tenant's sessions how many of its first tokens are cached."""
        return {
            owner[1]: num_blocks * self.kv.block_size
            for owner, num_blocks in self.kv.index.resumable_blocks().items()
            if owner is not None and owner[0] == tenant
        }

    def held_bytes(self, request: Request) -> int:
        """Bytes of KV blocks referenced by the request; 0 while it waits."""
        return self.kv.held_bytes(request)

    def stats(self) -> EngineStats:
        """Return the gauges of now and the counters since the start."""
        groups = self.kv.groups.items()
        return EngineStats(
            num_waiting=len(self.scheduler.waiting),
            num_running=len(self.scheduler.running),
            num_free_blocks={kind: group.pool.num_free for kind, group in groups},
            num_used_blocks={kind: group.pool.num_used for kind, group in groups},
            num_cached_blocks={kind: group.pool.num_cached for kind, group in groups},
            num_steps=self._num_steps,
            num_prefill_tokens=self._num_prefill_tokens,
            num_decode_tokens=self._num_decode_tokens,
            num_preemptions=self.scheduler.num_preemptions,
            num_evicted_blocks=dict(self.kv.index.num_evicted),
            prefix_stats={tenant: replace(u) for tenant, u in self.scheduler.prefix_stats.items()},
            fair_share=self.scheduler.shares,
        )

    def check_integrity(self) -> None:
        """Assert that no block, row or request is leaked."""
        self.scheduler.check_integrity()
        live = {r.request_id for r in (*self.scheduler.running, *self.scheduler.waiting)}
        assert live == set(self._requests), "a request is lost"
        assert self._answers.request_ids <= live, "a text stream is leaked"

    def _check_idle(self) -> None:
        """Log what is leaked, which shows when the engine is idle; costs next to nothing."""
        leaked = {k.value: g.pool.num_used for k, g in self.kv.groups.items() if g.pool.num_used}
        if leaked or self.kv.requests or self._requests or self._answers.request_ids:
            logger.error(
                "Leaked while idle: blocks %s, rows %d, requests %d, text streams %d.",
                leaked,
                len(self.kv.requests),
                len(self._requests),
                len(self._answers.request_ids),
            )

    # The beats of a step

    def _expire(self) -> None:
        now = time.monotonic()
        for request in list(self._requests.values()):
            if request.deadline_at is not None and request.deadline_at <= now:
                self._finish(request, FinishReason.DEADLINE)

    def _compute(self, output: SchedulerOutput) -> None:
        """Run the model over a planned step and take in the sampled tokens.

        Whatever goes wrong ends the requests of this step with FinishReason.ERROR, and no others.
        """
        started_at = time.perf_counter()
        try:
            batch = build_batch(output, self.kv)
            logits = self.runner.execute(batch)
            sampled = self.sampler.sample(logits, output.sampling)
            self._update(output, sampled, time.perf_counter() - started_at)
        except Exception as error:  # border: the engine loop
            self._fail(output, error)

    def _collect(self) -> list[RequestOutput]:
        outputs, self._outputs = self._outputs, []
        if not self.has_work:
            self._check_idle()
        return outputs

    def _update(self, output: SchedulerOutput, sampled: SamplerOutput, seconds: float) -> None:
        failed = {output.sampling[row] for row in sampled.errors}
        self.scheduler.update(output, failed)
        num_decode = sum(item.is_decode for item in output.scheduled)
        self._num_steps += 1
        self._num_decode_tokens += num_decode
        self._num_prefill_tokens += output.num_tokens - num_decode
        self.prefill_meter.record_step(output.prefill_chunks, num_decode, seconds)
        rows = zip(output.sampling, sampled.token_ids, sampled.logprobs, strict=True)
        for row, (request, token_id, logprobs) in enumerate(rows):
            if row in sampled.errors:
                error = BrioletteError(sampled.errors[row])
                self._finish(request, FinishReason.ERROR, error=error, is_sound=False)
            elif row in sampled.dead_ends:
                self._finish(request, FinishReason.ERROR, error=sampled.dead_ends[row])
            else:
                self._append(request, token_id, logprobs)

    def _append(self, request: Request, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Take in a sampled token; end the request if that completes its answer."""
        delta, end = self._answers.append(request, token_id)
        new = NewTokens([token_id], None if logprobs is None else [logprobs])
        if end is None:
            self._outputs.append(make_output(request, new=new, delta=delta))
        else:
            self._finish(request, end.reason, new=new, delta=delta, matched_stop=end.matched_stop)

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        *,
        new: NewTokens | None = None,
        delta: AnswerDelta | None = None,
        matched_stop: str | int | None = None,
        error: BrioletteError | None = None,
        is_sound: bool = True,
    ) -> None:
        """End a request: the one way out of the engine, for every reason.

        Unless it `is_sound`, others must not resume from what it has computed.
        """
        self.scheduler.finish(request, reason, is_sound=is_sound)
        del self._requests[request.request_id]
        delta = delta or AnswerDelta()
        delta.add(self._answers.finish(request))
        self._outputs.append(
            make_output(request, new=new, delta=delta, matched_stop=matched_stop, error=error)
        )

    def _fail(self, output: SchedulerOutput, error: Exception) -> None:
        ids = " ".join(f"request_id={item.request.request_id}" for item in output.scheduled)
        logger.error("A step of %d tokens failed. %s", output.num_tokens, ids, exc_info=error)
        if not isinstance(error, BrioletteError):
            error = BrioletteError(f"{type(error).__name__} while computing: {error}")
        self.scheduler.charge(output)  # a tenant whose requests break steps doesn't get them free
        for item in output.scheduled:
            if not item.request.is_finished:
                self._finish(item.request, FinishReason.ERROR, error=error)

    # At arrival

    def _withdraw(self, request: Request) -> None:
        """Drop what a failed `add` has left behind."""
        self._requests.pop(request.request_id, None)
        self._answers.withdraw(request)
        self.scheduler.withdraw(request)

    def _resume(self, request: Request, chat: bool) -> None:
        """Open its answer, with the output it came with; end it if that is complete already."""
        end = self._answers.begin(request, chat)
        if end is not None:
            self._finish(request, end.reason, matched_stop=end.matched_stop)
