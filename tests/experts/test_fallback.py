"""One copy of a group, and its host dies: the decoder computes it itself, with the same bits."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from cluster.checkpoint import Checkpoint
from cluster.errors import CheckpointError, Unavailable
from cluster.placement import ExpertGroups, ExpertPlacement
from cluster.spec import AttentionKind, ModelSpec
from engine.cache.kv_cache import KVCacheConfig
from engine.core import EngineCore
from engine.limits import SpecLimits
from engine.model.decoder_layer import Experts
from engine.model.model import GemmaDecoder
from engine.request import SamplingParams
from engine.runner import ModelRunner
from experts import fallback as fallback_module
from experts import router as router_module
from experts.fallback import Fallback
from experts.local import LocalExperts
from experts.router import ExpertRouter
from experts.weights import OwnedExperts, load_experts
from tests.support.engine.tiny_models import tiny_model
from tests.support.experts.swarm import HOSTS, Swarm
from tests.support.experts.tiny_experts import random_topk

GROUPS = ExpertGroups(8, 4)
ONE_COPY = ExpertPlacement.spread(GROUPS, HOSTS)
PROMPTS = [[5, 9, 11, 60], [7] * 20, [100, 3, 2]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model("26b").save_pretrained(path)
    return path


@contextlib.contextmanager
def swarm(
    model_dir: Path, on_wait: Callable[[], None] = lambda: None
) -> Iterator[tuple[Swarm, ExpertRouter, Fallback]]:
    """Two hosts, each the only one of its groups, and a router with a fallback."""
    spec, checkpoint = ModelSpec.load(model_dir), Checkpoint(model_dir)
    fallback = Fallback(spec, checkpoint, GROUPS, dtype=torch.float32, batch_invariant=True)
    hosts = Swarm(model_dir, ONE_COPY)
    try:
        with hosts.router(fallback=fallback, on_wait=on_wait) as router:
            yield hosts, router, fallback
    finally:
        hosts.close()


def make_core(model_dir: Path, experts: Experts) -> EngineCore:
    spec = ModelSpec.load(model_dir)
    kv = KVCacheConfig(4, {AttentionKind.GLOBAL: 100, AttentionKind.SLIDING: 100})
    model = GemmaDecoder.load(spec, Checkpoint(model_dir), batch_invariant=True)
    limits = SpecLimits.from_spec(spec, max_model_len=120)
    return EngineCore(ModelRunner(model, kv, experts), kv, spec_limits=limits)


def answers(core: EngineCore, victims: Swarm | None = None) -> list[list[int]]:
    """Greedy tokens; the host "b" is killed after the eighth step."""
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    for index, prompt in enumerate(PROMPTS):
        core.add(request_id=str(index), prompt_ids=prompt, sampling=sampling)
    num_steps = 0
    while core.has_work:
        if num_steps == 8 and victims is not None:
            victims.signal("b", signal.SIGKILL)
        for output in core.step():
            assert output.error is None
            tokens[int(output.request_id)] += output.new_token_ids
        num_steps += 1
    return tokens


def test_killing_the_only_host_of_a_group_changes_no_token(model_dir: Path) -> None:
    torch.set_num_threads(1)
    spec, checkpoint = ModelSpec.load(model_dir), Checkpoint(model_dir)
    local = LocalExperts(spec, checkpoint, GROUPS, dtype=torch.float32, batch_invariant=True)
    undisturbed = answers(make_core(model_dir, local))
    with swarm(model_dir) as (hosts, router, _):
        assert answers(make_core(model_dir, router), hosts) == undisturbed
        assert list(router.problems()) == ["b"]
        assert router.stats().num_fallbacks >= spec.num_layers
        assert router.stats().num_calls > 0  # the other host was asked to the end


def test_only_the_dead_hosts_groups_are_read_and_freed_again(model_dir: Path) -> None:
    spec, checkpoint = ModelSpec.load(model_dir), Checkpoint(model_dir)
    local = LocalExperts(spec, checkpoint, GROUPS, dtype=torch.float32, batch_invariant=True)
    with swarm(model_dir) as (hosts, router, fallback):
        assert not fallback.held
        hosts.signal("b", signal.SIGKILL)
        for layer_idx in range(spec.num_layers):
            call = layer_idx, *random_topk(spec, 20, layer_idx)
            assert torch.equal(router.combine(router.dispatch(*call)), local.dispatch(*call))
        assert fallback.held == list(ONE_COPY.groups_of("b"))
        fallback.free()
        assert not fallback.held


def test_without_memory_the_call_fails_with_the_reason(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModelSpec.load(model_dir)
    with swarm(model_dir) as (hosts, router, fallback):
        hosts.signal("b", signal.SIGKILL)
        full = SimpleNamespace(available=0)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: full)
        assert not fallback.can_hold([1])
        with pytest.raises(Unavailable, match=r"No expert host answers for groups .*'b'"):
            router.combine(router.dispatch(0, *random_topk(spec, 20)))
        monkeypatch.undo()
        router.combine(router.dispatch(0, *random_topk(spec, 20)))
        full.available = 0
        assert fallback.can_hold(fallback.held)  # what is there needs no more


class SlowDisk:
    """Stands for `load_experts`: reads when it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_read = threading.Event()
        self.error: Exception | None = None
        monkeypatch.setattr(fallback_module, "load_experts", self._load)
        monkeypatch.setattr(router_module, "WAIT_S", 0.05)

    def _load(self, *args: Any, **options: Any) -> OwnedExperts:
        assert self.may_read.wait(10)
        if self.error is not None:
            raise self.error
        return load_experts(*args, **options)


def test_a_call_that_waits_for_weights_says_so(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, checkpoint = ModelSpec.load(model_dir), Checkpoint(model_dir)
    local = LocalExperts(spec, checkpoint, GROUPS, dtype=torch.float32, batch_invariant=True)
    disk = SlowDisk(monkeypatch)
    loading: list[list[int]] = []

    def on_wait() -> None:
        loading.append(fallback.loading)
        fallback.free()  # frees nothing while a group is being read
        if len(loading) == 3:
            disk.may_read.set()

    with swarm(model_dir, on_wait) as (hosts, router, fallback):
        hosts.signal("b", signal.SIGKILL)
        call = 0, *random_topk(spec, 20)
        assert torch.equal(router.combine(router.dispatch(*call)), local.dispatch(*call))
        assert loading[:3] == [list(ONE_COPY.groups_of("b"))] * 3
        assert fallback.loading == []


def test_a_host_that_is_back_first_is_asked(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModelSpec.load(model_dir)
    disk = SlowDisk(monkeypatch)

    def bring_back() -> None:
        router.use(ONE_COPY, hosts.endpoints)

    with swarm(model_dir, bring_back) as (hosts, router, _):
        call = 0, *random_topk(spec, 20)
        expected = router.combine(router.dispatch(*call))
        router.use(ONE_COPY, {"a": hosts.endpoints["a"]})
        assert torch.equal(router.combine(router.dispatch(*call)), expected)
        assert not disk.may_read.is_set() and router.stats().num_fallbacks == 0
        disk.may_read.set()


def test_weights_that_cannot_be_read_fail_the_call_and_are_tried_again(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModelSpec.load(model_dir)
    disk = SlowDisk(monkeypatch)
    call = 0, *random_topk(spec, 20)
    with swarm(model_dir) as (hosts, router, _):
        hosts.signal("b", signal.SIGKILL)
        monkeypatch.setattr(fallback_module, "LONGEST_LOAD_S", 0.2)
        with pytest.raises(Unavailable, match="takes too long"):
            router.combine(router.dispatch(*call))
        disk.error = CheckpointError("The file is gone.")
        disk.may_read.set()
        with pytest.raises(CheckpointError, match="gone"):
            router.combine(router.dispatch(*call))
        disk.error = None
        router.combine(router.dispatch(*call))
