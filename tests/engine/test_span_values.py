"""Spans in the decoder: the numbers of transformers' Gemma 4, and the same bits in any batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from cluster.checkpoint import Checkpoint
from cluster.placement import ExpertGroups
from cluster.spec import AttentionKind, ModelSpec
from deployments.verify.logits import LogitsRecorder
from engine.cache.block_hash import BlockHasher
from engine.cache.kv_cache import KVCacheConfig
from engine.core import EngineCore
from engine.limits import SpecLimits
from engine.model.model import GemmaDecoder
from engine.request import Request, SamplingParams
from engine.runner import ModelRunner
from engine.spans import MediaSpan
from experts.local import LocalExperts
from tests.support.engine.attention_cases import draw
from tests.support.engine.memory_store import MemoryStore, TensorBlocks
from tests.support.engine.paged_driver import PagedDriver, Sequence
from tests.support.engine.schedulers import evict_all
from tests.support.engine.tiny_models import IMAGE_TOKEN_ID, tiny_multimodal
from tests.support.experts.remote_experts import remote_experts

GLOBAL, SLIDING = AttentionKind.GLOBAL, AttentionKind.SLIDING
MAX_ERROR = 1e-4
VISION = {"use_bidirectional_attention": "vision"}
MEMBERS: dict[str, tuple[str, dict[str, Any]]] = {
    "26b": ("26b", VISION),
    "26b-wide": ("26b", {**VISION, "hidden_size": 192, "head_dim": 64, "sliding_window": 70}),
    "31b": ("31b", VISION),
    "12b": ("12b", VISION),
    "e4b": ("e4b", {}),
    "e2b": ("e2b", {}),
    "all-at-once": ("26b", {**VISION, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 3}),
}
# The window of most is 10: the second span reaches past it.
STARTS_AND_LENGTHS = [(3, 6), (13, 23), (40, 1)]
NUM_PROMPT = 53


@dataclass
class Subject:
    """transformers' model and ours, with a prompt of three images."""

    reference: Any
    model: GemmaDecoder
    experts: LocalExperts | None
    path: Path
    alone: dict[Any, list[Tensor]] = field(default_factory=dict)

    @property
    def is_bidirectional(self) -> bool:
        return bool(self.reference.config.text_config.use_bidirectional_attention == "vision")

    def prompt(self, *, is_bidirectional: bool | None = None, seed: int = 0) -> Sequence:
        if is_bidirectional is None:
            is_bidirectional = self.is_bidirectional
        width = self.model.spec.hidden_size
        spans = [
            MediaSpan(
                start, 3 * draw(n, width, seed=seed + n), b"%d" % (seed + n), is_bidirectional
            )
            for start, n in STARTS_AND_LENGTHS
        ]
        generator = torch.Generator().manual_seed(1)
        token_ids = torch.randint(2, IMAGE_TOKEN_ID, (NUM_PROMPT,), generator=generator).tolist()
        for span in spans:
            token_ids[span.start : span.stop] = [IMAGE_TOKEN_ID] * span.num_tokens
        return Sequence(token_ids, spans=spans)

    def driver(self, **options: Any) -> PagedDriver:
        return PagedDriver(self.model, self.experts, **options)

    @torch.inference_mode()
    def expected(self, sequence: Sequence) -> Tensor:
        """Logits at all positions."""
        types = torch.zeros(1, len(sequence.token_ids), dtype=torch.int64)
        for span in sequence.spans:
            types[:, span.start : span.stop] = 1 if span.is_bidirectional else 3
        images = tuple(span.embeddings for span in sequence.spans)
        options: dict[str, Any] = {"mm_token_type_ids": types}
        if self.model.spec.model_type == "gemma4_unified":
            # Its forward() would let images be seen both ways in global layers too, where its own
            # masks for generation, like Gemma 4's, don't.
            options["attention_mask"] = self.reference.create_masks_for_generate(
                self.reference.config,
                torch.empty(1, len(sequence.token_ids), self.model.spec.hidden_size),
                None,
                None,
                None,
                types,
            )
        outputs = self.reference(
            torch.tensor([sequence.token_ids]),
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=images)},
            use_cache=False,
            **options,
        )
        logits: Tensor = outputs.logits[0]
        return logits


def make_subject(name: str, path: Path, *, batch_invariant: bool = False) -> Subject:
    member, overrides = MEMBERS[name]
    reference = tiny_multimodal(member, **overrides)
    reference.save_pretrained(path)
    spec, checkpoint = ModelSpec.load(path), Checkpoint(path)
    model = GemmaDecoder.load(spec, checkpoint, batch_invariant=batch_invariant)
    experts = None
    if spec.is_moe:
        groups = ExpertGroups(spec.num_experts, 2)
        experts = LocalExperts(
            spec, checkpoint, groups, dtype=torch.float32, batch_invariant=batch_invariant
        )
    return Subject(reference, model, experts, path)


def check(subject: Subject, sequence: Sequence) -> None:
    expected = subject.expected(sequence)
    assert sequence.logits
    for position, logits in sequence.logits.items():
        assert (logits - expected[position]).abs().max() < MAX_ERROR, position


# The numbers of transformers


@pytest.mark.parametrize("name", MEMBERS)
def test_logits_equal_transformers(cpu_kernels: str, tmp_path: Path, name: str) -> None:
    subject = make_subject(name, tmp_path)
    driver = subject.driver()
    whole, last_logits, chunked = (subject.prompt() for _ in range(3))
    driver.step([(whole, NUM_PROMPT)])
    driver.step([(last_logits, NUM_PROMPT)], all_logits=False)
    other = Sequence([5, 6, 7, 8, 9])
    driver.step([(other, 3), (chunked, 12)])
    driver.step([(chunked, 24), (other, 1)])
    driver.step([(other, 1), (chunked, 17)])
    causal = subject.prompt(is_bidirectional=False)
    for num_new in (5, 15, 33):  # may be cut anywhere
        driver.step([(causal, num_new)])
    for sequence in (whole, last_logits, chunked, causal):
        check(subject, sequence)
    differs = (whole.logits[20] - causal.logits[20]).abs().max() > 10 * MAX_ERROR
    assert differs == subject.is_bidirectional


def test_with_remote_experts_in_two_micro_batches(tmp_path: Path) -> None:
    subject = make_subject("26b", tmp_path)
    with remote_experts(tmp_path, ExpertGroups(8, 2)) as (router, _):
        driver = PagedDriver(subject.model, router, num_micro_batches=2)
        sequences = [subject.prompt(seed=seed) for seed in (0, 100, 200)]
        driver.step([(sequence, NUM_PROMPT) for sequence in sequences])
    for sequence in sequences:
        check(subject, sequence)


@pytest.mark.parametrize("name", ["26b", "12b", "e4b"])
def test_the_embeddings_of_tokens_give_the_bits_of_the_tokens(
    cpu_kernels: str, tmp_path: Path, name: str
) -> None:
    subject = make_subject(name, tmp_path)
    plain, spanned = Sequence(list(range(2, 2 + NUM_PROMPT))), Sequence([])
    for start, n in STARTS_AND_LENGTHS:
        if subject.model.per_layer_inputs is not None:  # which a medium has no token for
            plain.token_ids[start : start + n] = [subject.model.spec.pad_token_id] * n
        embeddings = subject.model.embed_tokens(torch.tensor(plain.token_ids[start : start + n]))
        spanned.spans.append(MediaSpan(start, embeddings, b"digest"))
    spanned.token_ids = list(plain.token_ids)
    for span in spanned.spans:
        spanned.token_ids[span.start : span.stop] = [IMAGE_TOKEN_ID] * span.num_tokens
    for sequence in (plain, spanned):
        driver = subject.driver()
        for num_new in (7, 20, NUM_PROMPT - 27):
            driver.step([(sequence, num_new)])
    assert_equal_bits(spanned, plain)


def assert_equal_bits(ours: Sequence, others: Sequence) -> None:
    assert ours.logits.keys() == others.logits.keys()
    for position, logits in ours.logits.items():
        assert torch.equal(logits, others.logits[position]), position


# The same bits in any batch, and from what is kept


@pytest.mark.parametrize("name", ["26b", "26b-wide", "12b", "all-at-once"])
def test_no_bit_depends_on_the_batch(cpu_kernels: str, tmp_path: Path, name: str) -> None:
    subject = make_subject(name, tmp_path, batch_invariant=True)
    alone, beside = subject.prompt(), subject.prompt()
    subject.driver().step([(alone, NUM_PROMPT)])
    driver, other = subject.driver(), subject.prompt(seed=100)
    driver.step([(other, 10)])
    driver.step([(other, 26), (beside, 3)])
    driver.step([(beside, 10), (other, 3)])
    driver.step([(other, 2), (beside, 24), (Sequence([5] * 9), 9)])
    driver.step([(beside, 16), (other, 1)])
    assert_equal_bits(beside, alone)


AMPLE, CRAMPED = ({GLOBAL: n, SLIDING: n} for n in (200, 31))


class Engine:
    """An engine over the subject's model that checks each answer against a run alone."""

    def __init__(self, subject: Subject, num_blocks: Any = AMPLE, **options: Any) -> None:
        self.subject, spec = subject, subject.model.spec
        kv = KVCacheConfig(4, num_blocks)
        runner = ModelRunner(subject.model, kv, subject.experts)
        self.recorder = LogitsRecorder()
        store = options.get("store")
        if store is not None:
            store.blocks = TensorBlocks(runner.kv_tensors, [layer.kind for layer in spec.layers])
        limits = SpecLimits.from_spec(spec, 100)
        self.core = EngineCore(runner, kv, spec_limits=limits, sampler=self.recorder, **options)

    def ask(self, *prompts: Sequence, num_tokens: int = 6) -> list[Request]:
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        self.recorder.logits.clear()
        requests = [
            self.core.add(
                request_id=str(i),
                prompt_ids=prompt.token_ids,
                sampling=sampling,
                spans=prompt.spans,
            )
            for i, prompt in enumerate(prompts)
        ]
        while self.core.has_work:
            assert not any(output.error for output in self.core.step())
        self.core.check_integrity()
        return requests

    def check(self, *prompts: Sequence, num_tokens: int = 6) -> list[int]:
        """Ask them together; how many tokens of each were cached."""
        requests = self.ask(*prompts, num_tokens=num_tokens)
        logits = self.recorder.logits
        for i, prompt in enumerate(prompts):
            for ours, cold in zip(logits[str(i)], self.cold(prompt, num_tokens), strict=True):
                assert torch.equal(ours, cold)
        return [request.num_cached_tokens for request in requests]

    def cold(self, prompt: Sequence, num_tokens: int) -> list[Tensor]:
        """Logits of a run alone, in steps as large as it likes."""
        media = [(span.digest, span.is_bidirectional) for span in prompt.spans]
        key, known = repr((prompt.token_ids, media, num_tokens)), self.subject.alone
        if key not in known:
            alone = Engine(self.subject)
            alone.ask(prompt, num_tokens=num_tokens)
            known[key] = alone.recorder.logits["0"]
        return known[key]


HASHER = BlockHasher(4, "model")


@pytest.fixture(params=["all-at-once", "e4b"])
def subject(cpu_kernels: str, request: pytest.FixtureRequest, tmp_path: Path) -> Subject:
    return make_subject(request.param, tmp_path, batch_invariant=True)


@pytest.mark.parametrize("hasher", [None, HASHER])
def test_chunks_and_preemption(subject: Subject, hasher: BlockHasher | None) -> None:
    engine = Engine(subject, CRAMPED, max_num_batched_tokens=25, max_num_seqs=5, hasher=hasher)
    prompts = [Sequence([7] * 30), subject.prompt(), subject.prompt(seed=100), Sequence([8] * 9)]
    engine.check(*prompts, num_tokens=20)
    assert engine.core.stats().num_preemptions > 0


def test_prefixes_are_those_of_the_same_images(subject: Subject) -> None:
    engine = Engine(subject, hasher=HASHER)
    assert engine.check(subject.prompt()) == [0]
    assert engine.check(subject.prompt()) == [52]
    assert engine.check(subject.prompt(seed=100)) == [0]
    assert engine.check(subject.prompt(seed=100), subject.prompt()) == [52, 52]
    other_way = subject.prompt(is_bidirectional=not subject.is_bidirectional)
    assert engine.check(other_way) == [0]
    last = subject.prompt()
    last.spans[-1] = subject.prompt(seed=100).spans[-1]
    assert engine.check(last) == [0]  # the two part at a block without a window yet
    assert engine.check(last) == [52]


def test_a_prefix_ends_in_no_span(subject: Subject) -> None:
    """The prompt ends with an image, so its last full block does."""
    engine = Engine(subject, hasher=HASHER, max_num_batched_tokens=24)
    prompt = subject.prompt()
    prompt.token_ids, prompt.spans = prompt.token_ids[:36], prompt.spans[:2]
    begins_at = 12 if subject.is_bidirectional else 32
    assert [engine.check(prompt)[0] for _ in range(2)] == [0, begins_at]
    longer = Sequence([*prompt.token_ids, 5, 6], spans=prompt.spans)
    assert [engine.check(longer)[0] for _ in range(2)] == [begins_at if begins_at == 12 else 36, 36]


def test_going_on_from_a_store_after_a_restart(subject: Subject) -> None:
    store = MemoryStore(1)
    prompt = subject.prompt()
    first = Engine(subject, hasher=HASHER, store=store)
    (request,) = first.ask(prompt)
    next_turn = Sequence([*prompt.token_ids, *request.output_ids, 9, 9], spans=prompt.spans)
    again = Engine(subject, hasher=HASHER, store=store)
    assert again.check(next_turn) == [56] and store.num_loaded > 0
    evict_all(again.core.scheduler)
    assert again.check(next_turn) == [60]
    num_loaded, others = store.num_loaded, subject.prompt(seed=100)
    third = Engine(subject, hasher=HASHER, store=store)
    assert third.check(Sequence(next_turn.token_ids, spans=others.spans)) == [0]
    assert store.num_loaded == num_loaded
