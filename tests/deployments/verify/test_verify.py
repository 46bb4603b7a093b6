"""`briolette verify`: that warm answers are the cold ones, and that it sees where they aren't."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import Config
from cluster.errors import ConfigError, ContextTooLong
from cluster.spec import AttentionKind
from cluster.store.scripts import value_name
from cluster.store.value import HEADER_BYTES, header_of
from deployments import cli
from deployments.loading import LoadedModel, ModelSource, load_local_experts, load_model
from deployments.verify.card import conclusion, problems
from deployments.verify.prompts import Case, Conversation, read_cases, shipped_cases
from deployments.verify.redis_tier import RedisTier
from deployments.verify.verify import Answer, Comparison, Verifier
from engine.cache.block_store import BlockStore, StoredBlock
from engine.request import Request
from engine.runner import ModelRunner
from tests.support.engine.memory_store import MemoryStore, TensorBlocks
from tests.support.store.redis_servers import redis_server

LONGEST = 300


class FlippingStore(MemoryStore):
    """Gives back one block of a kind with one bit of its last key or value changed."""

    flipped: AttentionKind | None = None

    def load(self, request: Request, blocks: Sequence[StoredBlock]) -> bool:
        is_loaded = super().load(request, blocks)
        for block in blocks:
            if block.kind is self.flipped:
                assert isinstance(self.blocks, TensorBlocks)
                values = self.blocks.read(block.kind, block.block_id)
                bits = values[-1][-1].view(torch.int32)
                bits.view(-1)[-1] ^= 1 << 20
                self.blocks.write(block.kind, block.block_id, values)
                break
        return is_loaded


@dataclass
class MemoryTier:
    """Where the double of a store stands for Redis."""

    kinds: list[AttentionKind]
    store: FlippingStore = field(default_factory=lambda: FlippingStore(polls=1))
    tenant: str = "verify"

    @contextmanager
    def connect(self, runner: ModelRunner) -> Iterator[BlockStore]:
        self.store.blocks = TensorBlocks(runner.kv_tensors, self.kinds)
        yield self.store


@dataclass
class Loaded:
    config: Config
    source: ModelSource
    model: LoadedModel

    def verifier(self, flipped: AttentionKind | None = None) -> Verifier:
        tier = MemoryTier([layer.kind for layer in self.source.spec.layers])
        tier.store.flipped = flipped
        return Verifier(self.config, self.source, self.model, tier)

    def cases(self) -> dict[str, Case]:
        engine = self.config.engine
        cases = shipped_cases(
            self.model.tokenizer,
            window=self.source.spec.sliding_window,
            block_size=engine.block_size,
            chunk=engine.max_num_batched_tokens,
            longest=LONGEST,
        )
        return {case.name: case for case in cases}


@pytest.fixture(scope="module")
def demo() -> Iterator[Loaded]:
    torch.set_num_threads(1)
    settings = {
        "batch_invariant": True,
        "experts.mode": "local",
        "engine.kv_bytes": 32 << 20,
        "engine.max_num_batched_tokens": 128,
    }
    config = Config.load(None, settings)
    source = ModelSource.open(config)
    yield Loaded(config, source, load_model(config, source, load_local_experts(config, source)))


def test_the_shipped_prompts_are_warm_and_equal(demo: Loaded) -> None:
    verifier = demo.verifier()
    results = {name: verifier.check(case) for name, case in demo.cases().items()}
    verdicts = [verdict for of_case in results.values() for verdict in of_case]
    assert all(verdict.is_warm and verdict.is_equal for verdict in verdicts)
    assert list(problems(results, str)) == []
    assert conclusion(results).startswith("Equal: ")
    lengths = {name: [v.num_prompt_tokens for v in found] for name, found in results.items()}
    assert lengths["around the window"] == [63, 64, 65]
    assert lengths["around a block"] == [15, 16, 17]
    assert lengths["around a step's budget"] == [127, 128, 129]
    assert lengths["long"] == [LONGEST]
    turns = results["many turns"]
    assert turns[2].filling.num_cached_tokens > turns[0].num_prompt_tokens  # the turns before it
    assert results["shared system prompt"][2].filling.num_cached_tokens > 0


@pytest.mark.parametrize("kind", list(AttentionKind))
def test_one_bit_that_changed_in_the_store_is_seen(demo: Loaded, kind: AttentionKind) -> None:
    results = {"long": demo.verifier(flipped=kind).check(demo.cases()["long"])}
    (verdict,) = results["long"]
    assert verdict.is_warm and verdict.memory.is_equal and verdict.filling.is_equal
    assert not verdict.redis.is_equal and verdict.redis.largest_difference > 0
    assert verdict.redis.smallest_gap is not None and verdict.redis.smallest_gap > 0
    (line,) = problems(results, str)
    assert line.startswith("long, prompt 1, from Redis: logits differ by up to")
    assert conclusion(results).startswith("Different: 1 of 1 prompts")


def test_an_answer_that_was_computed_again_proves_nothing(demo: Loaded) -> None:
    verifier = demo.verifier()
    assert isinstance(verifier.tier, MemoryTier)
    verifier.tier.store.fails = True
    results = {"window": verifier.check(demo.cases()["around the window"])}
    assert all(verdict.is_equal and not verdict.is_warm for verdict in results["window"])
    assert "0 of 48 tokens came from Redis" in next(problems(results, str))
    assert conclusion(results).startswith("Nothing differs, but not all answers were warm")


def test_a_token_that_changes_ends_the_comparison() -> None:
    def answer(*best: int) -> Answer:
        rows = [torch.full((4,), -1.0).index_fill(0, torch.tensor([i]), 1.0) for i in best]
        return Answer([1], list(best), rows, 0)

    compared = Comparison.of(answer(2, 3, 1), answer(2, 1, 3))
    assert compared == Comparison(0, 1, 2.0, 2.0, (1, 3, 1))
    assert Comparison.of(answer(2, 3), answer(2, 3)).is_equal


@pytest.mark.parametrize("value", [-0.0, float("nan")])
def test_what_compares_as_equal_or_not_at_all_is_a_difference_of_bits(value: float) -> None:
    cold = Answer([1], [0], [torch.tensor([1.0, 0.0])], 0)
    warm = Answer([1], [0], [torch.tensor([1.0, value])], 0)
    assert not Comparison.of(cold, warm).is_equal


def test_a_file_of_prompts(demo: Loaded, tmp_path: Path) -> None:
    tokenizer: Any = demo.model.tokenizer
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"turns": ["Hello", "And?"], "system": "Be brief."}\n\n{"prompt": "One two"}\n'
    )
    chat, raw = read_cases(file, tokenizer)
    assert (chat.name, raw.name) == ("line 1", "line 3")
    assert chat.conversations == [Conversation(["Hello", "And?"], "Be brief.")]
    assert raw.conversations[0].token_ids == tokenizer.encode("One two")


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "has no prompt"),
        ("What is 2 + 3?", "line 1 is not JSON"),
        ('{"prompt": "a"}\n{"prompt": 1}', "line 2 must be"),
        ('{"turns": []}', "line 1 must be"),
        ('{"turns": ["a"], "sytem": "b"}', "line 1 must be"),
    ],
)
def test_a_wrong_file_of_prompts_is_said(
    demo: Loaded, tmp_path: Path, content: str, said: str
) -> None:
    tokenizer: Any = demo.model.tokenizer
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_cases(file, tokenizer)
    with pytest.raises(ConfigError, match="can't be read"):
        read_cases(tmp_path / "none", tokenizer)


def test_a_prompt_that_is_too_long_is_said_by_its_name(demo: Loaded) -> None:
    token_ids = [9] * (demo.model.limits.max_model_len + 1)
    case = Case("line 7", [Conversation(token_ids=token_ids)])
    with pytest.raises(ContextTooLong, match="line 7: The prompt has"):
        demo.verifier().check(case)


# Against real servers


def arguments(tmp_path: Path, *more: str) -> list[str]:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"turns": ["What is 27 + 58, and what is the capital of Norway?", "And?"]}\n')
    small = ["--set", "engine.kv_bytes=32MiB", "--prompts", str(file)]
    return ["verify", *small, *more]


def test_the_command_starts_a_redis_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "line 1" in said and "Equal: 2 prompts" in said


def test_a_redis_that_is_there_keeps_nothing_and_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with redis_server(tmp_path) as address:
        client = address.client()
        client.set("briolette:{anna}:kv:a", "of somebody else")
        assert cli.main(arguments(tmp_path, "--set", f"store.url={address.url}")) == 0
        assert client.keys() == [b"briolette:{anna}:kv:a"]
        assert client.info("commandstats")["cmdstat_set"]["calls"] > 1  # it was used
    assert cli.main(arguments(tmp_path, "--set", f"store.url={address.url}")) == 1
    assert "doesn't answer" in capsys.readouterr().err


@pytest.mark.parametrize("mode, code", [("--batch-invariant", 1), ("--no-batch-invariant", 0)])
def test_values_that_changed_under_a_right_checksum_are_seen(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    code: int,
) -> None:
    connect = RedisTier.connect

    def flip_and_connect(
        tier: RedisTier, runner: ModelRunner
    ) -> AbstractContextManager[BlockStore]:
        flip_a_bit(tier)
        return connect(tier, runner)

    monkeypatch.setattr(RedisTier, "connect", flip_and_connect)
    assert cli.main(arguments(tmp_path, mode)) == code
    said = " ".join(capsys.readouterr().out.split())
    assert "line 1, prompt 1, from Redis: logits differ by up to" in said
    assert "smallest gap between the two best tokens there" in said
    assert "Different: " in said


def flip_a_bit(tier: RedisTier) -> None:
    """In each value that the tenant has."""
    client = tier.address.client()
    for name in client.scan_iter(match=value_name(tier.tenant, b"*")):
        value: Any = client.get(name)
        payload = bytearray(value[HEADER_BYTES:])
        payload[-2] ^= 1 << 4
        client.set(name, header_of([payload], name, value[16:32]) + payload, keepttl=True)
