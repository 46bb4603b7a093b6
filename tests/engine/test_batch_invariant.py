"""batch_invariant mode: the logits of a request are bit-equal whatever else happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.errors import ConfigError
from cluster.kernels import invariant
from cluster.kernels.check import check_invariance
from cluster.kernels.invariant import gated_gelu, linear
from cluster.kernels.torch_kernels import InvariantKernels, TorchKernels
from cluster.placement import ExpertGroups
from cluster.spec import KVLayout
from engine.attention.invariant_attention import InvariantAttention, check_attention
from experts.local import LocalExperts
from tests.support.engine.invariant_subjects import NUM_GROUPS, Subject, load
from tests.support.engine.paged_driver import PagedDriver, Sequence
from tests.support.engine.tiny_models import make_tiny
from tests.support.experts.remote_experts import remote_experts

# The wide ones have several key blocks, and GEMMs large enough for the library's other kernels.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "26b": ("26b", {}),
    "26b-wide": (
        "26b",
        {"hidden_size": 192, "head_dim": 64, "moe_intermediate_size": 96, "sliding_window": 70},
    ),
    "12b-wide": ("12b", {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024}),
    "e2b": ("e2b", {"attention_bias": True}),
}
MAX_PROMPT = 150
KV_LAYOUTS: tuple[KVLayout, ...] = ("values", "projection", "separate")


@pytest.fixture(scope="module")
def subjects(cpu_kernels: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    return {
        name: load(make_tiny(member, tmp_path_factory.mktemp(name), **overrides))
        for name, (member, overrides) in MODELS.items()
    }


@pytest.mark.parametrize(
    ("name", "kv_layout"),
    [(n, rows) for n in MODELS for rows in KV_LAYOUTS if n != "e2b" or rows == "separate"],
)
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_batch_and_any_chunking(
    subjects: dict[str, Subject], name: str, kv_layout: KVLayout, data: st.DataObject
) -> None:
    """Random prompts enter at random steps, in random chunks and orders, in mixed batches."""
    subject = subjects[name]
    driver = PagedDriver(subject.model, subject.experts, kv_layout=kv_layout)
    check_random_batches(subject, driver, data, kv_layout)


@pytest.mark.parametrize("name", ["26b-wide", "12b-wide"])
def test_raw_rows_give_the_bits_of_a_split_cache(subjects: dict[str, Subject], name: str) -> None:
    for length in (1, 65, MAX_PROMPT):
        raw, split = (
            subjects[name].run_alone(length, 2, rows) for rows in ("projection", "separate")
        )
        assert_equal_bits(raw, split)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_remote_experts_and_a_lost_host(subjects: dict[str, Subject], data: st.DataObject) -> None:
    """Hold the bits with two copies of every group, where a host closes in the middle of a step."""
    subject = subjects["26b"]
    groups = ExpertGroups(subject.model.spec.num_experts, NUM_GROUPS)
    with remote_experts(subject.path, groups, num_copies=2, batch_invariant=True) as cluster:
        router, hosts = cluster
        num_micro_batches = data.draw(st.sampled_from([1, 2]))
        driver = PagedDriver(subject.model, router, num_micro_batches=num_micro_batches)
        check_random_batches(subject, driver, data)  # while both are well
        assert router.stats().num_retries == 0
        # An early layer, so that a later one must notice.
        layer_idx = data.draw(st.integers(0, subject.model.spec.num_layers // 2))
        router.doomed = layer_idx, data.draw(st.sampled_from(hosts))
        check_random_batches(subject, driver, data)
        assert router.stats().num_retries >= 1


def check_random_batches(
    subject: Subject, driver: PagedDriver, data: st.DataObject, kv_layout: KVLayout = "values"
) -> None:
    lengths = st.sampled_from([1, 2, 3, 16, 17, 40, 64, 65, 100, 129, MAX_PROMPT])
    keys = data.draw(
        st.lists(st.tuples(lengths, st.integers(0, 2)), min_size=1, max_size=5, unique=True)
    )
    references = [subject.run_alone(*key, kv_layout) for key in keys]
    sequences = [Sequence(list(reference.token_ids)) for reference in references]
    while unfinished := [s for s in sequences if s.num_computed < len(s.token_ids) - 1]:
        chosen = data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique_by=id))
        chunks = st.sampled_from([1, 1, 2, 5, 16, 31, 64, MAX_PROMPT])
        left = [len(s.token_ids) - 1 - s.num_computed for s in chosen]
        work = [(s, min(data.draw(chunks), n)) for s, n in zip(chosen, left, strict=True)]
        driver.step(work)
    for sequence in sequences:
        driver.release(sequence)
    for reference, sequence in zip(references, sequences, strict=True):
        assert_equal_bits(sequence, reference)


def assert_equal_bits(sequence: Sequence, reference: Sequence) -> None:
    assert sequence.logits.keys() == reference.logits.keys()
    for position, expected in reference.logits.items():
        assert torch.equal(sequence.logits[position], expected), f"position {position}"


@pytest.mark.parametrize("name", ["26b", "26b-wide"])
def test_two_micro_batches_and_threads(subjects: dict[str, Subject], name: str) -> None:
    """Experts elsewhere compute the same sums; with two micro-batches the GEMMs are other ones."""
    subject = subjects[name]
    references = [subject.run_alone(length, 1) for length in (17, 64, 129)]
    sequences = [Sequence(list(reference.token_ids)) for reference in references]
    assert subject.experts is not None
    driver = PagedDriver(subject.model, _Remote(subject.experts), num_micro_batches=2)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        driver.step([(s, len(s.token_ids) - 1) for s in sequences])
    finally:
        torch.set_num_threads(num_threads)
    for reference, sequence in zip(references, sequences, strict=True):
        assert_equal_bits(sequence, reference)


class _Remote:
    """Experts in the same process that behave as remote ones."""

    is_remote = True

    def __init__(self, local: LocalExperts) -> None:
        self.dispatch, self.combine = local.dispatch, local.combine
        self.abandon = local.abandon


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_linear(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(70, 64), torch.randn(96, 64), torch.randn(96)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    whole = linear(x, weight, bias)
    assert torch.allclose(whole.float(), linear(x, weight, bias).float(), atol=0.3, rtol=0.02)
    for start, stop in ((0, 1), (3, 8), (5, 16), (11, 70), (40, 57), (7, 7)):
        part = linear(x[start:stop], weight, bias)
        assert torch.equal(part, whole[start:stop])


def test_elements_of_gated_gelu() -> None:
    gate, up = torch.randn(1001), torch.randn(1001)
    whole = gated_gelu(gate, up)
    assert torch.allclose(whole, TorchKernels().gated_gelu(gate, up), atol=1e-6)
    for start in range(70):
        part = gated_gelu(gate[start : start + 9], up[start : start + 9])
        assert torch.equal(part, whole[start : start + 9])


def test_checks_pass_here() -> None:
    check_invariance(InvariantKernels(), [torch.randn(96, 64), torch.randn(5, 1000)])
    for num_kv_heads in (1, 2, 8):
        check_attention(
            InvariantAttention,
            num_heads=8,
            num_kv_heads=num_kv_heads,
            head_dim=32,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )


def test_a_machine_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this machine's GEMM has other bits for few rows, whatever the padding."""

    def fickle(x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: bool) -> Tensor:
        return x @ weight.T + (1e-6 if len(x) < 4 else 0)

    monkeypatch.setattr(invariant, "linear", fickle)
    with pytest.raises(ConfigError, match=r"shape \(96, 64\).*Turn batch_invariant off"):
        check_invariance(InvariantKernels(), [torch.randn(96, 64)])
