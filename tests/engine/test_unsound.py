"""A request whose hidden states are NaN ends, and its freed blocks harm nobody."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.checkpoint import Checkpoint
from cluster.placement import ExpertGroups
from cluster.spec import AttentionKind, ModelSpec
from engine.cache.block_hash import BlockHasher
from engine.cache.kv_cache import KVCacheConfig
from engine.core import EngineCore
from engine.limits import SpecLimits
from engine.model.model import GemmaDecoder
from engine.request import SamplingParams
from engine.runner import ModelRunner
from experts.local import LocalExperts
from tests.support.engine.tiny_models import tiny_model

BLOCK_SIZE = 8
KV = KVCacheConfig(BLOCK_SIZE, {AttentionKind.GLOBAL: 25, AttentionKind.SLIDING: 13})
SAMPLING = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
CLEAN = {"a": [5, 9, 11], "b": [7] * 20, "c": [100, 3, 2, 60, 8, 8, 9, 1, 33]}
LONG = [3 + i % 90 for i in range(60)]


class PoisonedExperts(LocalExperts):
    """While `first_row` is set, what comes back for this row and all after it is NaN."""

    first_row: int | None = None

    def combine(self, handle: Tensor) -> Tensor:
        rows = super().combine(handle)
        if self.first_row is not None:
            rows[self.first_row :] = math.nan
        return rows


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model("26b").save_pretrained(path)
    return path


def make_core(model_dir: Path, batch_invariant: bool) -> tuple[EngineCore, PoisonedExperts]:
    torch.set_num_threads(1)
    spec, checkpoint = ModelSpec.load(model_dir), Checkpoint(model_dir)
    groups = ExpertGroups(spec.num_experts, 2)
    experts = PoisonedExperts(
        spec, checkpoint, groups, dtype=torch.float32, batch_invariant=batch_invariant
    )
    model = GemmaDecoder.load(spec, checkpoint, batch_invariant=batch_invariant)
    core = EngineCore(
        ModelRunner(model, KV, experts),
        KV,
        spec_limits=SpecLimits.from_spec(spec, max_model_len=100),
        max_num_batched_tokens=16,
        hasher=BlockHasher(BLOCK_SIZE, "model", ("default",)),
    )
    return core, experts


def add_clean(core: EngineCore) -> None:
    for name, prompt in CLEAN.items():
        core.add(request_id=name, prompt_ids=prompt, sampling=SAMPLING)


def finish(core: EngineCore) -> tuple[dict[str, list[int]], list[str]]:
    """Every request's tokens, and who failed for logits that are not finite."""
    tokens: dict[str, list[int]] = {}
    unsound = []
    while core.has_work:
        for output in core.step():
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
            if output.error is not None:
                assert "not finite" in output.error
                unsound.append(output.request_id)
    core.check_integrity()
    return tokens, unsound


@pytest.fixture
def undisturbed(cpu_kernels: str, model_dir: Path, batch_invariant: bool) -> dict[str, list[int]]:
    core, _ = make_core(model_dir, batch_invariant)
    add_clean(core)
    tokens, unsound = finish(core)
    assert not unsound
    return tokens


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_later_requests_are_sound(
    model_dir: Path, batch_invariant: bool, undisturbed: dict[str, list[int]]
) -> None:
    core, experts = make_core(model_dir, batch_invariant)
    experts.first_row = 0
    core.add(request_id="unsound", prompt_ids=LONG, sampling=SAMPLING)
    assert finish(core) == ({"unsound": []}, ["unsound"])
    experts.first_row = None
    add_clean(core)
    assert finish(core) == (undisturbed, [])
    core.add(request_id="again", prompt_ids=LONG, sampling=SAMPLING)
    assert finish(core)[1] == []  # nothing of it was kept


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_neighbours_that_get_its_blocks_before_it_ends_are_sound(
    model_dir: Path, batch_invariant: bool, undisturbed: dict[str, list[int]]
) -> None:
    """The window leaves blocks of a prompt long before its first logits show what is wrong."""
    core, experts = make_core(model_dir, batch_invariant)
    add_clean(core)
    early = core.step() + core.step()  # all their prompts
    experts.first_row = len(CLEAN)
    core.add(request_id="unsound", prompt_ids=LONG, sampling=SAMPLING)
    tokens, unsound = finish(core)
    assert unsound == ["unsound"]
    for output in early:
        tokens[output.request_id][:0] = output.new_token_ids
    assert tokens == {**undisturbed, "unsound": []}
