"""An EngineCore whose runner checks every key that it reads and computes no model."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from cluster.spec import AttentionKind
from engine.batch import Batch
from engine.cache.block_hash import BlockHasher
from engine.cache.kv_cache import KVCacheConfig
from engine.core import EngineCore
from engine.limits import SpecLimits
from engine.outputs import RequestOutput
from engine.request import SamplingParams
from engine.sampler import Sampler
from engine.text.dialect import NO_DIALECT
from engine.text.tokenizer import Tokenizer

GLOBAL, SLIDING = AttentionKind.GLOBAL, AttentionKind.SLIDING
VOCAB_SIZE = 60
WINDOW = 6
SHARING = ("ann", "bob")  # tenants
GREEDY = SamplingParams(temperature=0, max_tokens=8)


def logits_of(all_tokens: Sequence[int], window_tokens: Sequence[int]) -> Tensor:
    """A model: any function of what global attention and the window see will do."""
    digest = 17
    for token in (*all_tokens, -1, *window_tokens):
        digest = (digest * 31 + token + 2) % 1_000_003
    return torch.tensor([(digest * (v + 3) * 7919 % 10_007) / 1000 for v in range(VOCAB_SIZE)])


class FakeRunner:
    """Keeps (token, position) per slot and reads them back through the block tables."""

    def __init__(self, kv: KVCacheConfig) -> None:
        self.block_size = kv.block_size
        self.slots = {
            kind: torch.full((num_blocks * kv.block_size, 2), -1)
            for kind, num_blocks in kv.num_blocks.items()
        }
        self.batches: list[Batch] = []
        self.fails_with: Exception | None = None

    def execute(self, batch: Batch) -> Tensor:
        self.batches.append(batch)
        if self.fails_with is not None:
            raise self.fails_with
        written = torch.stack([batch.input_ids, batch.positions], dim=1)
        for kind, slots in self.slots.items():
            slots[batch.slot_mapping[kind]] = written
        starts = [0]
        for query_len in batch.query_lens:
            starts.append(starts[-1] + query_len)
        wanted = set(batch.logits_indices.tolist())
        logits = []
        for row, seq_len in enumerate(batch.seq_lens):
            for index in range(starts[row], starts[row + 1]):
                position = int(batch.positions[index])
                assert position == seq_len - (starts[row + 1] - index)
                read = [
                    self.read(batch, GLOBAL, row, 0, position),
                    self.read(batch, SLIDING, row, max(0, position - WINDOW + 1), position),
                ]
                if index in wanted:
                    logits.append(logits_of(*read))
        return torch.stack(logits) if logits else torch.empty(0, VOCAB_SIZE)

    def read(self, batch: Batch, kind: AttentionKind, row: int, first: int, last: int) -> list[int]:
        positions = torch.arange(first, last + 1)
        blocks = batch.block_tables[kind][row][positions // self.block_size]
        read = self.slots[kind][blocks * self.block_size + positions % self.block_size]
        assert (blocks > 0).all() and torch.equal(read[:, 1], positions), "wrong keys are read"
        return cast(list[int], read[:, 0].tolist())


def greedy_answer(prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(logits_of(tokens, tokens[-WINDOW:]).argmax()))
    return tokens[len(prompt) :]


def make_core(
    *,
    num_global: int = 101,
    num_sliding: int = 101,
    block_size: int = 4,
    max_model_len: int = 64,
    eos_token_ids: tuple[int, ...] = (),
    **options: Any,
) -> EngineCore:
    kv = KVCacheConfig(block_size, {GLOBAL: num_global, SLIDING: num_sliding})
    limits = SpecLimits(max_model_len, WINDOW, VOCAB_SIZE, eos_token_ids=eos_token_ids)
    options = {"hasher": BlockHasher(block_size, "model", SHARING), **options}
    return EngineCore(FakeRunner(kv), kv, spec_limits=limits, sampler=Sampler(), **options)


def runner_of(core: EngineCore) -> FakeRunner:
    assert isinstance(core.runner, FakeRunner)
    return core.runner


def drain(core: EngineCore, max_steps: int = 2000) -> dict[str, list[RequestOutput]]:
    """Step until idle; all outputs by request. Whatever happened, nothing may be leaked."""
    outputs: dict[str, list[RequestOutput]] = {}
    for _ in range(max_steps):
        if not core.has_work:
            break
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
        core.check_integrity()
        if core.waits_for_blocks:
            time.sleep(0.001)
    assert not core.has_work, "requests without an end"
    assert set(core.stats().num_used_blocks.values()) == {0}
    for of_request in outputs.values():
        ends = [output.finish_reason for output in of_request]
        assert ends[-1] is not None and ends[:-1] == [None] * (len(ends) - 1)
    return outputs


def fail(*_: object) -> None:
    raise RuntimeError("unforeseen")


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


def prompts(count: int, seed: int = 0, max_len: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, max_len))] for _ in range(count)
    ]


CRAMPED: dict[str, Any] = {"num_global": 17, "num_sliding": 9, "max_num_batched_tokens": 7}


def letters() -> Tokenizer:
    """A tokenizer of one letter per id, as far as an engine looks at it."""

    class Letters:
        vocab_size = VOCAB_SIZE
        eos_ids = ()
        dialect = NO_DIALECT

        def token_bytes(self, token_id: int) -> bytes:
            return spell([token_id]).encode()

        def encode_plain(self, text: str) -> list[int]:
            return [ord(letter) - ord("A") for letter in text]

    return cast(Tokenizer, Letters())


def spell(token_ids: Sequence[int]) -> str:
    return "".join(chr(ord("A") + token_id) for token_id in token_ids)
