"""The whole engine, from prompts to tokens, against transformers on tiny models."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cluster.checkpoint import Checkpoint
from cluster.placement import ExpertGroups
from cluster.spec import AttentionKind, ModelSpec
from engine.cache.kv_cache import KVCacheConfig
from engine.cache.kv_sizing import size_kv_cache
from engine.core import EngineCore
from engine.limits import SpecLimits
from engine.model.decoder_layer import Experts
from engine.model.model import GemmaDecoder
from engine.request import SamplingParams
from engine.runner import ModelRunner
from experts.local import LocalExperts
from tests.support.engine.tiny_models import tiny_model
from tests.support.experts.remote_experts import remote_experts

NUM_TOKENS = 16
GAP = 1e-6  # between the two best logits, under which fp32 may choose either

AMPLE = KVCacheConfig(4, {AttentionKind.GLOBAL: 200, AttentionKind.SLIDING: 200})
CRAMPED = KVCacheConfig(4, {AttentionKind.GLOBAL: 33, AttentionKind.SLIDING: 14})


def make_core(
    model_dir: Path, kv: KVCacheConfig, experts: Experts | None = None, **options: Any
) -> EngineCore:
    spec = ModelSpec.load(model_dir)
    checkpoint = Checkpoint(model_dir)
    if spec.is_moe and experts is None:
        groups = ExpertGroups(spec.num_experts, 2)
        experts = LocalExperts(spec, checkpoint, groups, dtype=torch.float32)
    runner = ModelRunner(GemmaDecoder.load(spec, checkpoint), kv, experts)
    limits = SpecLimits.from_spec(spec, max_model_len=120)
    return EngineCore(runner, kv, spec_limits=limits, **options)


@torch.inference_mode()
def gap_at(model: PreTrainedModel, tokens: list[int]) -> float:
    logits: Tensor = model(torch.tensor([tokens])).logits[0, -1]
    best, second = logits.topk(2).values
    return float(best - second)


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """Greedy tokens by full forward passes; the end of sequence ends nothing here."""
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("member", ["26b", "12b", "e2b"])
def test_answers_equal_transformers_however_they_are_batched(member: str, tmp_path: Path) -> None:
    check_answers(member, tmp_path)


def test_answers_equal_transformers_with_remote_experts_and_a_lost_host(tmp_path: Path) -> None:
    tiny_model("26b").save_pretrained(tmp_path)
    with remote_experts(tmp_path, ExpertGroups(8, 2), num_copies=2) as (router, hosts):
        router.doomed = 2, hosts[0]
        check_answers("26b", tmp_path, router)
        assert router.stats().num_retries >= 1


def check_answers(member: str, tmp_path: Path, experts: Experts | None = None) -> None:
    torch.set_num_threads(1)
    model = tiny_model(member)
    model.save_pretrained(tmp_path)
    rng = random.Random(member)
    prompts = [[rng.randrange(2, 160) for _ in range(n)] for n in (1, 5, 30, 60, 17)]
    expected = [generate(model, prompt) for prompt in prompts]

    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    ample = make_core(tmp_path, AMPLE, experts)
    cramped = make_core(tmp_path, CRAMPED, experts, max_num_batched_tokens=13, max_num_seqs=5)
    for core in (ample, cramped):
        answers: list[list[int]] = [[] for _ in prompts]
        for index, prompt in enumerate(prompts):
            core.add(request_id=str(index), prompt_ids=prompt, sampling=sampling)
        for _ in range(1000):
            if not core.has_work:
                break
            for output in core.step():
                assert output.error is None
                answers[int(output.request_id)] += output.new_token_ids
        core.check_integrity()
        for prompt, answer, want in zip(prompts, answers, expected, strict=True):
            assert len(answer) == NUM_TOKENS
            same = next((i for i in range(NUM_TOKENS) if answer[i] != want[i]), None)
            assert same is None or gap_at(model, prompt + want[:same]) < GAP
    assert cramped.stats().num_preemptions > 0


def test_a_cache_sized_by_bytes_serves(tmp_path: Path) -> None:
    model = tiny_model("e4b")
    model.save_pretrained(tmp_path)
    spec = ModelSpec.load(tmp_path)
    kv = size_kv_cache(spec, 400_000, 120, dtype=torch.float32, max_num_batched_tokens=32)
    core = make_core(tmp_path, kv, max_num_batched_tokens=32)
    core.add(request_id="r", prompt_ids=[5] * 100, sampling=SamplingParams(ignore_eos=True))
    for _ in range(30):
        assert all(output.error is None for output in core.step())
    assert not core.has_work
