"""Random cases of prefix caching, in which every warm row of logits is compared with a cold one.

Each case is an engine of random sizes that serves a few rounds of concurrent requests whose prompts
share prefixes. Between and during rounds blocks are evicted, or the engine is replaced and only the
store survives. The reference is a run of the same prompt alone, in an engine without a cache.
`briolette verify` compares chosen prompts; tests and benchmarks run these.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from cluster.spec import AttentionKind, KVLayout
from deployments.verify.logits import LogitsRecorder, difference
from engine.cache.block_hash import BlockHasher
from engine.cache.block_store import BlockStore
from engine.cache.kv_cache import KVCacheConfig
from engine.core import EngineCore
from engine.limits import SpecLimits
from engine.request import SamplingParams
from engine.runner import ModelRunner

MAX_PROMPT, NUM_TOKENS = 150, 3
MAX_MODEL_LEN = MAX_PROMPT + 4 * NUM_TOKENS + 32
WAIT_S = 0.0002  # between two polls of a store
GARBAGE = 1e3  # fills the KV cache at first: reading a slot before it is written changes logits

MakeRunner = Callable[[KVCacheConfig], ModelRunner]
ConnectStore = Callable[[ModelRunner], BlockStore]  # what it stores outlives the runner


@dataclass(slots=True)
class Tally:
    """Sums over all cases."""

    num_cases: int = 0
    num_requests: int = 0
    num_hits: int = 0
    num_cached_tokens: int = 0
    num_evicted: int = 0  # blocks
    num_restarts: int = 0
    num_rows: int = 0  # rows of logits that were compared
    num_unequal: int = 0  # rows of logits in which a bit differs
    largest_difference: float = 0.0

    def compare(self, warm: Sequence[Tensor], cold: Sequence[Tensor]) -> None:
        """Count the rows of one answer, each [vocab_size], and those that differ."""
        for ours, reference in zip(warm, cold, strict=True):
            self.num_rows += 1
            if (by := difference(ours, reference)) is not None:
                self.num_unequal += 1
                self.largest_difference = max(self.largest_difference, by)


@dataclass
class RandomCases:
    """Runs random cases on one model.

    Args:
        make_runner: Returns a runner with a KV cache of its own; all share the model's weights.
        connect: Opens the store of a new engine; None for cases without a store.
        kv_layout: The layout of the KV cache, as `engine.kv_layout`.
    """

    make_runner: MakeRunner
    connect: ConnectStore | None = None
    kv_layout: KVLayout = "values"
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        ample = KVCacheConfig(8, dict.fromkeys(AttentionKind, 64), kv_layout=self.kv_layout)
        runner = self.make_runner(ample)
        self.spec = runner.model.spec
        self._alone = EngineCore(
            runner, ample, spec_limits=SpecLimits.from_spec(self.spec, MAX_MODEL_LEN)
        )
        self._cold: dict[tuple[int, ...], tuple[list[Tensor], list[int]]] = {}

    def run(self, num_cases: int, seed: int = 0) -> Tally:
        """Run so many cases; returns the sums over all cases so far."""
        texts = make_texts(self.spec.vocab_size)
        for case in range(num_cases):
            _EngineCase(self, random.Random(f"{seed} {case}"), texts).run()
            self.tally.num_cases += 1
        return self.tally

    def cold(self, prompt_ids: Sequence[int]) -> tuple[list[Tensor], list[int]]:
        """Return the logits and the tokens of a prompt that runs alone and without a cache."""
        key = tuple(prompt_ids)
        if key not in self._cold:
            recorder = self._alone.sampler = LogitsRecorder()
            tokens = answers(self._alone, {"r": list(prompt_ids)})["r"]
            self._cold[key] = recorder.logits["r"], tokens
        return self._cold[key]


class _EngineCase:
    """One engine and its rounds of requests."""

    def __init__(self, owner: RandomCases, rng: random.Random, texts: list[list[int]]) -> None:
        self.owner, self.rng, self.texts = owner, rng, texts
        self.block_size = rng.choice([4, 8, 16])
        self.budget = rng.choice([5, 16, 33, 64, 256])
        self.checkpoint_blocks = rng.choice([0, 0, 1, 3])
        window = owner.spec.sliding_window
        blocks = -(-MAX_MODEL_LEN // self.block_size)
        window_blocks = -(-window // self.block_size) + 2
        self.kv = KVCacheConfig(
            self.block_size,
            {
                AttentionKind.GLOBAL: 1 + blocks * rng.choice([1, 2, 4]),
                AttentionKind.SLIDING: 1 + window_blocks * rng.choice([1, 2, 8]),
            },
            kv_layout=owner.kv_layout,
        )
        near = (-1, 0, 1)
        borders = {window, 2 * window, self.block_size, self.budget, window + self.block_size}
        borders |= {self.block_size * rng.randint(1, 9) for _ in range(3)}
        self.lengths = [n + d for n in borders for d in near if 1 <= n + d <= MAX_PROMPT]
        self.turns: list[list[int]] = []  # each prompt so far with its answer
        self.start()

    def start(self) -> None:
        """Start an engine with an empty cache, on the store of the one before."""
        runner = self.owner.make_runner(self.kv)
        for tensors in runner.kv_tensors.values():
            for tensor in tensors.stored:
                tensor.fill_(GARBAGE)
        self.recorder = LogitsRecorder()
        self.core = EngineCore(
            runner,
            self.kv,
            spec_limits=SpecLimits.from_spec(self.owner.spec, MAX_MODEL_LEN),
            sampler=self.recorder,
            hasher=BlockHasher(self.block_size, "model"),
            checkpoint_blocks=self.checkpoint_blocks,
            store=None if self.owner.connect is None else self.owner.connect(runner),
            max_num_batched_tokens=self.budget,
            max_num_seqs=4,
        )

    def run(self) -> None:
        for number in range(3):
            prompts = {f"{number}.{i}": self.draw_prompt() for i in range(self.rng.randint(1, 3))}
            tokens = answers(self.core, prompts, self.disturb)
            for request_id, prompt in prompts.items():
                cold_logits, cold_tokens = self.owner.cold(prompt)
                self.owner.tally.compare(self.recorder.logits[request_id], cold_logits)
                assert tokens[request_id] == cold_tokens or self.owner.tally.num_unequal
                self.turns.append(prompt + cold_tokens)
            if number == 2 or self.rng.random() < 0.3:
                self.count()
                self.owner.tally.num_restarts += number < 2
                self.start()

    def draw_prompt(self) -> list[int]:
        """Draw a part of a text, or the next turn of an earlier conversation."""
        if self.turns and self.rng.random() < 0.4:
            prompt = self.rng.choice(self.turns) + self.rng.choice(self.texts)[-5:]
            if len(prompt) <= MAX_PROMPT:
                return prompt
        return self.rng.choice(self.texts)[: self.rng.choice(self.lengths)]

    def disturb(self) -> None:
        """Evict some blocks at random, as other requests would."""
        if self.rng.random() < 0.15:
            kind, group = self.rng.choice(list(self.core.kv.groups.items()))
            self.core.kv.index.make_room(kind, self.rng.randint(0, group.pool.num_free))

    def count(self) -> None:
        stats, tally = self.core.stats(), self.owner.tally
        tally.num_evicted += sum(stats.num_evicted_blocks.values())
        for use in stats.prefix_stats.values():
            tally.num_requests += use.num_queries
            tally.num_hits += use.num_hits
            tally.num_cached_tokens += use.num_cached_tokens


def make_texts(vocab_size: int) -> list[list[int]]:
    """Return five texts of MAX_PROMPT tokens; four share a prefix of the first one."""
    rng = random.Random(7)
    first = [rng.randrange(2, vocab_size) for _ in range(MAX_PROMPT)]
    texts = [first]
    for num_shared in (9, 40, 64, 97):
        rest = [rng.randrange(2, vocab_size) for _ in range(MAX_PROMPT - num_shared)]
        texts.append(first[:num_shared] + rest)
    return texts


def answers(
    core: EngineCore, prompts: dict[str, list[int]], between_steps: Callable[[], None] | None = None
) -> dict[str, list[int]]:
    """Run prompts to their ends; returns greedy tokens by request id.

    Raises:
        RuntimeError: The engine failed.
    """
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    tokens: dict[str, list[int]] = {request_id: [] for request_id in prompts}
    for request_id, prompt_ids in prompts.items():
        core.add(request_id=request_id, prompt_ids=prompt_ids, sampling=sampling)
    while core.has_work:
        for output in core.step():
            if output.error is not None:
                raise RuntimeError(output.error)
            tokens[output.request_id] += output.new_token_ids
        if core.waits_for_blocks:
            time.sleep(WAIT_S)
        elif between_steps is not None:
            between_steps()
    core.check_integrity()
    return tokens
