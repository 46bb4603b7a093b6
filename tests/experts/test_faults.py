"""Expert hosts in processes of their own: the same bits as in-process, whoever dies or hangs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.checkpoint import Checkpoint
from cluster.errors import LinkError, Unavailable
from cluster.links.connect import Endpoint, Link, connect
from cluster.links.shared_memory import RING_BYTES
from cluster.placement import ExpertPlacement
from experts import host_links, wire
from experts.dispatch_plan import choose_copies
from experts.host import ExpertHost
from experts.local import LocalExperts
from experts.router import ExpertRouter
from experts.stats import ExpertLoad
from tests.support.experts.swarm import (
    GROUPS,
    HOSTS,
    ONE_COPY,
    SECRET,
    SPEC,
    TWO_COPIES,
    SlowHost,
    Swarm,
)
from tests.support.experts.tiny_experts import NUM_EXPERTS, random_topk, save_experts

CASES = [(seed, num_tokens) for seed, num_tokens in enumerate((1, 2, 7, 40, 1, 16))]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_experts(tmp_path_factory.mktemp("experts"))


def local_experts(model_dir: Path, dtype: torch.dtype) -> LocalExperts:
    return LocalExperts(SPEC, Checkpoint(model_dir), GROUPS, dtype=dtype, batch_invariant=True)


@pytest.fixture(scope="module")
def local(model_dir: Path) -> LocalExperts:
    return local_experts(model_dir, torch.float32)


@pytest.fixture
def swarm(model_dir: Path) -> Iterator[Callable[..., Swarm]]:
    swarms: list[Swarm] = []

    def start(placement: ExpertPlacement = TWO_COPIES, **options: Any) -> Swarm:
        swarms.append(Swarm(model_dir, placement, **options))
        return swarms[-1]

    yield start
    for each in swarms:
        each.close()


@pytest.fixture(scope="module")
def shared_swarm(model_dir: Path) -> Iterator[Swarm]:
    """For the tests that kill nobody."""
    swarm = Swarm(model_dir, ONE_COPY)
    yield swarm
    swarm.close()


def run(experts: ExpertRouter | LocalExperts, seed: int, num_tokens: int, layer: int = 0) -> Any:
    return experts.combine(experts.dispatch(layer, *random_topk(SPEC, num_tokens, seed)))  # type: ignore[arg-type]


def assert_same_bits(router: ExpertRouter, local: LocalExperts) -> None:
    for seed, num_tokens in CASES:
        for layer in range(SPEC.num_layers):
            output = run(router, seed, num_tokens, layer)
            assert torch.equal(output, run(local, seed, num_tokens, layer))


# -- the same bits --


@pytest.mark.parametrize("transport", ["shm", "unix", "tcp"])
def test_remote_equals_local_bit_for_bit(
    shared_swarm: Swarm, local: LocalExperts, transport: str
) -> None:
    with shared_swarm.router(transports=[transport]) as router:
        router.wait_ready(5)
        assert_same_bits(router, local)
        stats = router.stats()
        assert stats.num_retries == 0
        assert 0 < stats.latency_quantile_s(0.5) <= stats.latency_quantile_s(0.99) < 5
        assert 0 < stats.hidden_share < 1


def test_what_comes_after_the_answer_hides_nothing(shared_swarm: Swarm) -> None:
    with shared_swarm.router() as router:
        router.wait_ready(5)
        handle = router.dispatch(0, *random_topk(SPEC, 5, 1))
        time.sleep(0.5)  # long work of the decoder's; the hosts' is short
        router.combine(handle)
        stats = router.stats()
        assert 0 < stats.hidden_s <= stats.compute_s < 0.25


def test_two_micro_batches_in_flight_find_their_answers(
    shared_swarm: Swarm, local: LocalExperts
) -> None:
    with shared_swarm.router() as router:
        first = router.dispatch(0, *random_topk(SPEC, 5, 1))
        second = router.dispatch(1, *random_topk(SPEC, 30, 2))
        assert torch.equal(router.combine(second), run(local, 2, 30, 1))
        assert torch.equal(router.combine(first), run(local, 1, 5, 0))


def test_an_abandoned_handle_disturbs_nobody(shared_swarm: Swarm, local: LocalExperts) -> None:
    with shared_swarm.router() as router:
        for _ in range(20):
            router.abandon(router.dispatch(0, *random_topk(SPEC, 5, 1)))
        assert_same_bits(router, local)
        assert router.num_outstanding == 0


def test_bf16_travels_and_equals_local(swarm: Callable[..., Swarm], model_dir: Path) -> None:
    exact = local_experts(model_dir, torch.bfloat16)
    hidden, ids, weights = random_topk(SPEC, 19)
    hidden = hidden.bfloat16()
    with swarm(ONE_COPY, dtype=torch.bfloat16).router() as router:
        output = router.combine(router.dispatch(0, hidden, ids, weights))
    assert output.dtype is torch.bfloat16
    assert torch.equal(output, exact.dispatch(0, hidden, ids, weights))


# -- faults --


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_killed_host_changes_no_bit(
    swarm: Callable[..., Swarm], local: LocalExperts, transport: str
) -> None:
    hosts = swarm()
    with hosts.router(transports=[transport]) as router:
        assert_same_bits(router, local)
        killer = threading.Timer(0.03, hosts.signal, ("a", signal.SIGKILL))
        killer.start()
        slowest_s = 0.0
        end = time.monotonic() + 0.5
        for seed in range(10_000):
            start = time.monotonic()
            assert torch.equal(run(router, seed % 7, 16), run(local, seed % 7, 16))
            slowest_s = max(slowest_s, time.monotonic() - start)
            if start > end:
                break
        killer.join()
        assert router.stats().num_failures >= 1
        assert list(router.problems()) == ["a"]
        assert slowest_s < 2
        assert_same_bits(router, local)


def test_a_call_in_flight_survives_the_kill(
    swarm: Callable[..., Swarm], local: LocalExperts
) -> None:
    hosts = swarm(make=SlowHost, compute_s=0.3)
    with hosts.router() as router:
        first = router.dispatch(0, *random_topk(SPEC, 8, 1))
        second = router.dispatch(1, *random_topk(SPEC, 9, 2))
        hosts.signal("b", signal.SIGKILL)
        assert torch.equal(router.combine(first), run(local, 1, 8, 0))
        assert torch.equal(router.combine(second), run(local, 2, 9, 1))
        assert router.stats().num_failures >= 1


def test_a_host_that_hangs_is_left_at_the_deadline_and_found_again(
    swarm: Callable[..., Swarm], local: LocalExperts
) -> None:
    hosts = swarm()
    with hosts.router(timeout_s=0.2) as router:
        assert_same_bits(router, local)
        hosts.signal("a", signal.SIGSTOP)
        start = time.monotonic()
        assert torch.equal(run(router, 3, 16), run(local, 3, 16))
        assert 0.15 < time.monotonic() - start < 2
        start = time.monotonic()
        assert_same_bits(router, local)  # banned: nobody waits for it any more
        assert time.monotonic() - start < 2
        hosts.signal("a", signal.SIGCONT)
        router.wait_ready(15)
        assert_same_bits(router, local)


def test_a_slow_host_is_waited_for_and_asked_once(
    swarm: Callable[..., Swarm], local: LocalExperts
) -> None:
    hosts = swarm(ONE_COPY, make=SlowHost, compute_s=3.0)
    with hosts.router(timeout_s=0.4) as router:
        start = time.monotonic()
        assert torch.equal(run(router, 3, 4), run(local, 3, 4))
        assert time.monotonic() - start > 2.9
        assert router.stats().num_failures == 0
        assert not router.problems()


def test_a_long_call_waits_while_its_host_computes(
    swarm: Callable[..., Swarm], local: LocalExperts
) -> None:
    """The second call is longer than the link's room, and nobody reads it for a while."""
    hosts = swarm(ONE_COPY, make=SlowHost, compute_s=1.0)
    num_tokens = 3 * RING_BYTES // (4 * SPEC.hidden_size)
    with hosts.router(timeout_s=0.4) as router:
        first = router.dispatch(0, *random_topk(SPEC, 4, 1))
        second = router.dispatch(0, *random_topk(SPEC, num_tokens, 2))
        assert torch.equal(router.combine(first), run(local, 1, 4))
        assert torch.equal(router.combine(second), run(local, 2, num_tokens))
        assert router.stats().num_failures == 0


def test_a_host_that_computes_for_ever_is_left_in_the_end(
    swarm: Callable[..., Swarm], local: LocalExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_links, "LONGEST_CALL_S", 0.5)
    hosts = swarm(make=SlowHost, compute_s=1.0)
    with (
        hosts.router(timeout_s=0.2) as router,
        pytest.raises(Unavailable, match=r"took more than 0.5 s"),
    ):
        run(router, 3, 4)


def test_all_dead_without_fallback_is_unavailable_quickly(swarm: Callable[..., Swarm]) -> None:
    hosts = swarm()
    with hosts.router() as router:
        for host_id in HOSTS:
            hosts.signal(host_id, signal.SIGKILL)
        for _ in range(3):
            start = time.monotonic()
            with pytest.raises(Unavailable, match="No expert host answers"):
                run(router, 0, 4)
            assert time.monotonic() - start < 1


def test_reconnecting_survives_what_nobody_foresaw(
    shared_swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [TypeError("no endpoint"), TypeError("no endpoint")]

    def connect_later(*args: Any) -> Link:
        if broken:
            raise broken.pop()
        return connect(*args)

    monkeypatch.setattr(host_links, "connect", connect_later)
    with shared_swarm.router() as router:  # the first attempt at each host fails
        assert set(router.problems()) == set(HOSTS)
        assert "no endpoint" in router.problems()["a"]
        router.wait_ready(5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reconnecting_thread_that_died_is_replaced(
    shared_swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = shared_swarm.endpoints["a"]
    errors = [LinkError("not yet"), SystemExit(), LinkError("not yet")]

    def connect_later(to: Endpoint, *args: Any) -> Link:
        if to == endpoint and errors:
            raise errors.pop(0)
        return connect(to, *args)

    monkeypatch.setattr(host_links, "connect", connect_later)
    with shared_swarm.router() as router:
        for thread in threading.enumerate():
            if thread.name == "expert-reconnect":
                thread.join(5)
        assert len(errors) == 1 and list(router.problems()) == ["a"]
        router.use(shared_swarm.placement, shared_swarm.endpoints)
        router.wait_ready(5)


# -- handshake, epochs, endings --


@contextlib.contextmanager
def one_host(model_dir: Path, epoch: int = 1) -> Iterator[tuple[ExpertHost, ExpertPlacement]]:
    """A host in this process that owns everything."""
    placement = ExpertPlacement.spread(GROUPS, ["a"], epoch=epoch)
    checkpoint = Checkpoint(model_dir)
    host = ExpertHost(
        "a",
        SPEC,
        checkpoint,
        placement,
        dtype=torch.float32,
        device="cpu",
        secret=SECRET,
        batch_invariant=True,
    )
    with host:
        yield host, placement


def router_to(host: ExpertHost, placement: ExpertPlacement, model_dir: Path) -> ExpertRouter:
    return ExpertRouter(
        SPEC,
        placement,
        {"a": host.endpoint},
        secret=SECRET,
        weights_hash=Checkpoint(model_dir).fingerprint,
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"secret": b"guess"}, "secret"),
        ({"weights_hash": "other"}, "other weights"),
        ({"epoch": 7}, "serves epoch 1, not 7"),
        ({"host_id": "b"}, "This is expert host a, not b"),
    ],
)
def test_a_wrong_router_is_refused_with_the_reason(
    model_dir: Path, change: Mapping[str, Any], reason: str
) -> None:
    with one_host(model_dir) as (host, _):
        asked = {
            "secret": SECRET,
            "weights_hash": Checkpoint(model_dir).fingerprint,
            "epoch": 1,
            "host_id": "a",
            **change,
        }
        host_id = asked["host_id"]
        placement = ExpertPlacement.spread(GROUPS, [host_id], epoch=asked["epoch"])
        with ExpertRouter(
            SPEC,
            placement,
            {host_id: host.endpoint},
            secret=asked["secret"],
            weights_hash=asked["weights_hash"],
        ) as router:
            with pytest.raises(Unavailable, match=reason):
                run(router, 0, 3)
            with pytest.raises(Unavailable, match=reason):
                router.wait_ready(0.05)


def test_a_stale_epoch_is_refused_and_a_new_one_takes_over(
    model_dir: Path, local: LocalExperts
) -> None:
    with (
        one_host(model_dir) as (host, placement),
        router_to(host, placement, model_dir) as router,
    ):
        assert_same_bits(router, local)
        newer = dataclasses.replace(placement, epoch=2)
        host.use(newer)
        with pytest.raises(Unavailable, match="serves epoch 2, not 1"):
            run(router, 0, 3)
        router.use(newer, {"a": host.endpoint})
        router.wait_ready(5)
        assert_same_bits(router, local)
        assert host.stats().epoch == 2


def test_a_call_that_breaks_a_host_bans_nobody(model_dir: Path, local: LocalExperts) -> None:
    checkpoint = Checkpoint(model_dir)
    with contextlib.ExitStack() as stack:
        hosts = [
            ExpertHost(
                name,
                SPEC,
                checkpoint,
                TWO_COPIES,
                dtype=torch.float32,
                device="cpu",
                secret=SECRET,
                batch_invariant=True,
            )
            for name in HOSTS
        ]
        endpoints = {host.host_id: stack.enter_context(host).endpoint for host in hosts}
        router = stack.enter_context(
            ExpertRouter(
                SPEC, TWO_COPIES, endpoints, secret=SECRET, weights_hash=checkpoint.fingerprint
            )
        )
        router.load = ExpertLoad(SPEC.num_layers + 1, SPEC.num_experts)
        hidden, ids, weights = random_topk(SPEC, 4)
        with pytest.raises(Unavailable, match="has no layer 2"):
            router.combine(router.dispatch(SPEC.num_layers, hidden, ids, weights))
        assert router.stats().num_failures == 4  # each half, at each of its two copies
        assert not router.problems()
        assert_same_bits(router, local)
        hosts[0].use(dataclasses.replace(TWO_COPIES, epoch=5))
        assert_same_bits(router, local)  # the other copy answers
        assert not router.problems()


def test_a_router_moves_to_other_hosts(shared_swarm: Swarm, local: LocalExperts) -> None:
    with one_host(shared_swarm.model_dir) as (host, placement), shared_swarm.router() as router:
        in_flight = router.dispatch(0, *random_topk(SPEC, 8, 1))
        router.use(placement, {"a": host.endpoint})
        assert torch.equal(router.combine(in_flight), run(local, 1, 8))
        assert_same_bits(router, local)
        assert host.stats().num_calls >= len(CASES) * SPEC.num_layers
        router.use(shared_swarm.placement, shared_swarm.endpoints)
        assert_same_bits(router, local)


def test_a_host_counts_its_load(model_dir: Path) -> None:
    with one_host(model_dir) as (host, placement):
        with router_to(host, placement, model_dir) as router:
            run(router, 0, 10, layer=1)
        stats = host.stats()
        assert stats.num_calls == 1
        assert [sum(layer) for layer in stats.expert_load] == [0, 10 * SPEC.top_k_experts]


def test_nothing_is_left_open(model_dir: Path) -> None:
    def num_open() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def once() -> None:
        with (
            one_host(model_dir) as (host, placement),
            router_to(host, placement, model_dir) as router,
        ):
            run(router, 0, 3)

    once()
    before = num_open()
    for _ in range(3):
        once()
    assert num_open() == before
    assert "briolette-link" not in Path("/proc/self/maps").read_text()


# -- frames --


def join(parts: list[memoryview]) -> memoryview:
    """One frame of its parts, as a link delivers it."""
    return memoryview(bytearray(b"".join(parts)))


def frame_of(num_tokens: int = 4) -> bytes:
    hidden, ids, weights = random_topk(SPEC, num_tokens)
    return b"".join(encode(hidden, slot_table(ids, weights)))


def encode(hidden: Tensor, slots: Tensor, epoch: int = 1) -> list[memoryview]:
    return wire.encode_call(
        call_id=9, epoch=epoch, layer_idx=1, hidden_states=hidden, slot_table=slots
    )


def slot_table(ids: Tensor, weights: Tensor) -> Tensor:
    tokens = torch.arange(len(ids)).repeat_interleave(ids.shape[1])
    return torch.stack((tokens.int(), ids.flatten().int(), weights.flatten().view(torch.int32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_call_survives_the_wire(dtype: torch.dtype) -> None:
    hidden, ids, weights = random_topk(SPEC, 5)
    hidden = hidden.to(dtype)
    slots = slot_table(ids, weights)
    parts = encode(hidden, slots, epoch=3)
    call = wire.decode_call(join(parts), NUM_EXPERTS, SPEC.hidden_size)
    assert (call.call_id, call.epoch, call.layer_idx) == (9, 3, 1)
    assert torch.equal(call.hidden_states, hidden)
    assert torch.equal(call.slot_table, slots)
    reply = wire.decode_reply(join(wire.encode_rows(9, 3, hidden, 0.5)))
    assert (reply.call_id, reply.status, reply.compute_s) == (9, wire.ReplyStatus.OK, 0.5)
    assert torch.equal(reply.rows, hidden)


def test_a_malformed_frame_gets_a_reply_and_never_a_crash(model_dir: Path) -> None:
    noise = torch.Generator().manual_seed(0)
    frame = frame_of()

    def number(limit: int) -> int:
        return int(torch.randint(limit, (), generator=noise))

    with one_host(model_dir) as (host, _):
        for _ in range(1500):
            broken = bytearray(frame)
            for _ in range(1 + number(3)):
                broken[number(len(broken) if number(2) else 120)] = number(256)
            if number(3) == 0:
                broken = broken[: number(len(broken))]
            reply = wire.decode_reply(join(host.answer(memoryview(broken))))
            assert reply.status is not wire.ReplyStatus.FAILED, reply.reason
            with contextlib.suppress(LinkError):
                wire.decode_reply(memoryview(broken))
        assert wire.decode_reply(join(host.answer(memoryview(bytearray(frame))))).rows.numel()


def test_a_stranger_on_a_good_link_harms_nobody(model_dir: Path, local: LocalExperts) -> None:
    with one_host(model_dir) as (host, placement):
        fingerprint = Checkpoint(model_dir).fingerprint
        hello = wire.RouterHello("a", fingerprint, 1, 0.25).encode()
        with connect(host.endpoint, SECRET, hello) as link:
            link.send([b"what is this?"])
            assert wire.decode_reply(link.recv(5)).status is wire.ReplyStatus.REFUSED
        with router_to(host, placement, model_dir) as router:
            assert_same_bits(router, local)


def test_the_choice_of_copies_is_even_and_uses_what_is_left() -> None:
    assert choose_copies({0: ["a", "b"], 1: ["a", "b"], 2: ["a", "b"], 3: ["b"]}) == {
        0: "a", 1: "a", 2: "b", 3: "b",
    }  # fmt: skip
    assert choose_copies({0: ["a"], 1: [], 2: ["a"]}) == {0: "a", 2: "a"}
