"""The decoder's side of the hosts: when it starts without some, and what it says of lost ones."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import Unavailable
from deployments.decoder import host_directory, remote_experts
from experts import fallback
from experts.weights import load_experts
from tests.support.engine.tiny_models import tiny_model
from tests.support.experts.hosted_experts import hosted_experts


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model("26b").save_pretrained(path)
    return path


def test_a_late_copy_holds_the_start_up_only_for_a_while(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_experts, "LATE_HOST_S", 0.6)
    with hosted_experts(model_dir, num_copies=2) as parts:
        parts.start("host0")
        start = time.monotonic()
        parts.experts.wait_ready(30)
        assert 0.5 < time.monotonic() - start < 5
        assert list(parts.experts.router.problems()) == ["host1"]
        assert parts.call().shape == (20, parts.source.spec.hidden_size)
        assert parts.status().ready


def test_a_copy_that_comes_in_time_is_waited_for(model_dir: Path) -> None:
    with hosted_experts(model_dir, num_copies=2) as parts:
        parts.start("host0")
        timer = threading.Timer(0.5, parts.start, ["host1"])
        timer.start()
        start = time.monotonic()
        parts.experts.wait_ready(30)
        assert time.monotonic() - start < remote_experts.LATE_HOST_S / 2
        assert not parts.experts.router.problems()
        timer.join()


def test_a_group_without_any_host_fails_the_start_up(model_dir: Path) -> None:
    with hosted_experts(model_dir) as parts:
        parts.start("host0")
        with pytest.raises(Unavailable, match=r"host1.*not started"):
            parts.experts.wait_ready(0.5)


def test_one_bad_round_does_not_end_the_watch(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an answer that can't be read nor a router that breaks on a good one."""
    monkeypatch.setattr(host_directory, "WATCH_PERIOD_S", 0.05)
    with hosted_experts(model_dir) as parts:
        router = parts.experts.router
        use, breaks = router.use, [RuntimeError("unforeseen")]

        def use_later(*args: Any) -> None:
            if breaks:
                raise breaks.pop()
            use(*args)

        monkeypatch.setattr(router, "use", use_later)
        monkeypatch.setattr(parts.handles["host0"], "results", lambda **_: [{"pid": "what?"}])
        moved = threading.Event()
        parts.experts.watch(moved.set, lambda: None)
        parts.start("host1")
        assert moved.wait(5) and not breaks
        assert list(router.problems()) == ["host0"]
        monkeypatch.undo()
        parts.start("host0")
        router.wait_ready(5)


def test_health_says_who_computes_what_lost_its_host(model_dir: Path) -> None:
    with hosted_experts(model_dir) as parts:
        parts.start("host0")
        lost = parts.start("host1")
        parts.experts.wait_ready(30)
        before = parts.call()
        assert (parts.status().ready, parts.status().reason) == (True, "")
        lost.close()
        torch.testing.assert_close(parts.call(), before)
        status = parts.status()
        assert status.ready
        assert status.reason == (
            "No expert host is alive for groups 1, 3; the decoder computes them, slower."
        )
        parts.start("host1")
        parts.experts.wait_ready(30)
        torch.testing.assert_close(parts.call(), before)
        assert parts.status().reason == ""


def test_status_says_that_weights_are_loading(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_read = threading.Event()
    load = load_experts

    def load_later(*args: Any, **options: Any) -> Any:
        assert may_read.wait(10)
        return load(*args, **options)

    monkeypatch.setattr(fallback, "load_experts", load_later)
    reasons: list[str] = []

    def on_wait() -> None:
        reasons.append(parts.status().reason)
        may_read.set()

    with hosted_experts(model_dir) as parts:
        parts.start("host0")
        lost = parts.start("host1")
        parts.experts.wait_ready(30)
        parts.experts.watch(lambda: None, on_wait)
        lost.close()
        parts.call()
        assert reasons[0].endswith("slower. It is loading the experts of groups 1, 3.")
        assert parts.status().reason.endswith("slower.")


def test_health_without_fallback(model_dir: Path) -> None:
    with hosted_experts(model_dir, fallback="off") as parts:
        parts.start("host0")
        lost = parts.start("host1")
        parts.experts.wait_ready(30)
        lost.close()
        with pytest.raises(Unavailable, match="No expert host answers"):
            parts.call()
        status = parts.status()
        assert not status.ready
        assert status.reason == "No expert host is alive for groups 1, 3."
