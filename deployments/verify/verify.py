"""`briolette verify`: warm answers, from memory and from Redis, held to the cold ones.

It needs no running cluster and disturbs none: the model is loaded into this process, its experts
too, and what it keeps in Redis belongs to a tenant of its own that is deleted at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cluster.config import Config
from cluster.errors import BrioletteError, InvalidRequest
from deployments.layout import decoder_threads
from deployments.loading import (
    LoadedModel,
    ModelSource,
    OnProgress,
    load_local_experts,
    load_model,
    make_hasher,
)
from deployments.start.preflight import check_memory
from deployments.verify.logits import LogitsRecorder, difference
from deployments.verify.prompts import Case, read_cases, shipped_cases
from deployments.verify.redis_tier import redis_tier
from engine.cache.block_hash import BlockHasher
from engine.cache.block_store import BlockStore
from engine.core import EngineCore
from engine.request import SamplingParams
from engine.runner import ModelRunner
from engine.text.tokenizer import Tokenizer

NUM_TOKENS = 16  # of each answer
GARBAGE = 1e3  # where nothing was read into the KV cache: using it changes the logits
POLL_S = 0.001  # while blocks are on their way from the store


@dataclass(frozen=True, slots=True)
class Report:
    """The verdicts on the prompts of each case, by its name."""

    verdicts: Mapping[str, Sequence[Verdict]]
    tokenizer: Tokenizer

    @property
    def is_equal(self) -> bool:
        return all(v.is_equal for of_case in self.verdicts.values() for v in of_case)

    @property
    def is_warm(self) -> bool:
        return all(v.is_warm for of_case in self.verdicts.values() for v in of_case)


def verify(config: Config, prompts: Path | None, show: Callable[[dict[str, Any]], None]) -> Report:
    """Verify the prompts of a file, or the shipped ones.

    `show` is given news as `cards.StartDisplay` takes it. Raises the errors of loading a model,
    ConfigError for a wrong file, Unavailable when Redis doesn't answer.
    """
    config = config.model_copy(
        update={
            "engine": config.engine.model_copy(update={"prefix_caching": True}),
            "experts": config.experts.model_copy(update={"mode": "local"}),
        }
    )
    source = ModelSource.open(config)
    check_memory(config, source.spec, source.model_dir)
    torch.set_num_threads(decoder_threads(config, num_hosts=0))
    show({"phase": "Reaching Redis"})
    with redis_tier(config, source) as tier:
        show({"phase": "Loading the model"})
        experts = load_local_experts(config, source, _bar(show, "experts"))
        loaded = load_model(config, source, experts, _bar(show, "attention"))
        tokenizer = loaded.tokenizer
        if prompts is not None:
            cases = read_cases(prompts, tokenizer)
        else:
            cases = shipped_cases(
                tokenizer,
                window=source.spec.sliding_window,
                block_size=config.engine.block_size,
                chunk=config.engine.max_num_batched_tokens,
                longest=loaded.limits.max_model_len - NUM_TOKENS,
            )
        verifier = Verifier(config, source, loaded, tier)
        verdicts = {}
        for case in cases:
            show({"phase": f"Verifying: {case.name}"})
            verdicts[case.name] = verifier.check(case)
    return Report(verdicts, tokenizer)


class Tier(Protocol):
    """Where blocks outlive an engine, under a tenant that nobody else has."""

    @property
    def tenant(self) -> str: ...

    def connect(self, runner: ModelRunner) -> AbstractContextManager[BlockStore]:
        """The store as a new engine with this runner sees it; at the end all that was saved has
        been written.
        """


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt, its greedy answer, and the logits of each token of it."""

    prompt_ids: list[int]
    token_ids: list[int]
    logits: list[Tensor]  # [vocab_size] each, fp32, on the CPU
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """A warm answer beside the cold one, up to the first token that differs."""

    num_cached_tokens: int
    num_unequal: int = 0  # rows of logits in which a bit differs
    largest_difference: float = 0.0
    smallest_gap: float | None = None  # between the two best tokens, of the rows that differ
    first_token: tuple[int, int, int] | None = None  # that differs: its index, the cold, the warm

    @staticmethod
    def of(cold: Answer, warm: Answer) -> Comparison:
        num_unequal, largest, gaps = 0, 0.0, []
        first_token = None
        for index, (ours, reference) in enumerate(zip(warm.logits, cold.logits, strict=False)):
            if (by := difference(ours, reference)) is not None:
                num_unequal += 1
                largest = max(largest, by)
                best, second = reference.topk(2).values.tolist()
                gaps.append(best - second)
            tokens = cold.token_ids[index], warm.token_ids[index]
            if tokens[0] != tokens[1]:
                first_token = index, *tokens
                break
        return Comparison(
            warm.num_cached_tokens, num_unequal, largest, min(gaps, default=None), first_token
        )

    @property
    def is_equal(self) -> bool:
        return self.num_unequal == 0 and self.first_token is None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one prompt."""

    num_prompt_tokens: int
    num_tokens: int  # of the answer
    num_warm_tokens: int  # that a warm start can find: whole blocks, but for the last token
    filling: Comparison  # the first run of the engine that kept it; warm as far as it shares
    memory: Comparison
    redis: Comparison

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        return self.filling, self.memory, self.redis

    @property
    def is_equal(self) -> bool:
        return all(comparison.is_equal for comparison in self.comparisons)

    @property
    def is_warm(self) -> bool:
        """Whether there was anything to verify: all that could be kept was found."""
        found = (self.memory.num_cached_tokens, self.redis.num_cached_tokens)
        return all(num_tokens == self.num_warm_tokens for num_tokens in found)


@dataclass(frozen=True, slots=True)
class Verifier:
    """Runs cases through engines that share one loaded model and its KV cache's memory."""

    config: Config
    source: ModelSource
    loaded: LoadedModel
    tier: Tier

    def check(self, case: Case) -> list[Verdict]:
        """Each prompt of the case cold, from memory, and from the tier.

        Raises InvalidRequest for a prompt that can't be asked.
        """
        try:
            cold = list(self._cold(case))
        except InvalidRequest as error:
            raise type(error)(f"{case.name}: {error}") from None
        from_memory = list(self._from_memory(cold))
        from_tier = list(self._from_tier(cold))
        block_size = self.config.engine.block_size
        return [
            Verdict(
                len(answer.prompt_ids),
                len(answer.token_ids),
                (len(answer.prompt_ids) - 1) // block_size * block_size,
                *from_memory[i],
                from_tier[i],
            )
            for i, answer in enumerate(cold)
        ]

    def _cold(self, case: Case) -> Iterator[Answer]:
        """By an engine that keeps nothing."""
        engine, tokenizer = self._engine(None, None), self.loaded.tokenizer
        for conversation in case.conversations:
            answers: list[str] = []
            for _ in range(conversation.num_prompts):
                answer = self._ask(engine, conversation.prompt(tokenizer, answers))
                answers.append(tokenizer.decode(answer.token_ids))
                yield answer

    def _from_memory(self, cold: Sequence[Answer]) -> Iterator[tuple[Comparison, Comparison]]:
        """Each prompt twice, in an engine whose blocks the tier keeps."""
        with self._warm_engine() as engine:
            for answer in cold:
                filling, warm = (self._ask(engine, answer.prompt_ids) for _ in range(2))
                yield Comparison.of(answer, filling), Comparison.of(answer, warm)

    def _from_tier(self, cold: Sequence[Answer]) -> Iterator[Comparison]:
        """Each prompt in an engine that has seen nothing but what the tier gives back."""
        for answer in cold:
            # The memory still has what the last engine left there, perhaps in the right places.
            for tensors in self.loaded.runner.kv_tensors.values():
                for tensor in tensors.stored:
                    tensor.fill_(GARBAGE)
            with self._warm_engine() as engine:
                yield Comparison.of(answer, self._ask(engine, answer.prompt_ids))

    @contextmanager
    def _warm_engine(self) -> Iterator[EngineCore]:
        with self.tier.connect(self.loaded.runner) as store:
            yield self._engine(make_hasher(self.config, self.source), store)

    def _engine(self, hasher: BlockHasher | None, store: BlockStore | None) -> EngineCore:
        """Build an engine that caches prefixes with `hasher`, if any, and saves them in `store`."""
        engine = self.config.engine
        return EngineCore(
            self.loaded.runner,
            self.loaded.kv,
            spec_limits=self.loaded.limits,
            sampler=LogitsRecorder(),
            store=store,
            hasher=hasher,
            checkpoint_blocks=engine.checkpoint_blocks,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_num_seqs=engine.max_num_seqs,
        )

    def _ask(self, engine: EngineCore, prompt_ids: list[int]) -> Answer:
        recorder = engine.sampler
        assert isinstance(recorder, LogitsRecorder)
        request = engine.add(
            request_id="verify",
            prompt_ids=prompt_ids,
            sampling=SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS),
            tenant=self.tier.tenant,
        )
        while engine.has_work:
            for output in engine.step():
                if output.error is not None:
                    raise BrioletteError(f"The engine couldn't go on: {output.error}")
            if engine.waits_for_blocks:
                time.sleep(POLL_S)
        logits = recorder.logits.pop(request.request_id)
        return Answer(prompt_ids, request.output_ids, logits, request.num_cached_tokens)


def _bar(show: Callable[[dict[str, Any]], None], part: str) -> OnProgress:
    return lambda done, total: show({"parts": {part: done / total}})
