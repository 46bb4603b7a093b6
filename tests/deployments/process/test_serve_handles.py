"""Asking replicas through Serve's handle: what an absence looks like, and what a bug does."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException

from cluster.errors import LinkError
from deployments.process.serve_handles import ask_replicas


class Handle:
    """Answers, or raises, what it is given."""

    def __init__(self, answers: list[Any] | Exception) -> None:
        self.answers = answers

    def broadcast(self, method: str) -> Handle:
        return self

    def results(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert timeout_s > 0 and return_exceptions
        if isinstance(self.answers, Exception):
            raise self.answers
        return self.answers


def test_replicas_that_fail_are_left_out() -> None:
    assert ask_replicas(Handle([RayActorError(), {"pid": 7}]), "describe") == [{"pid": 7}]
    assert ask_replicas(Handle([]), "describe") == []


@pytest.mark.parametrize("error", [RayActorError(), RayServeException("away"), TimeoutError()])
def test_serve_may_be_away(error: Exception) -> None:
    with pytest.raises(LinkError, match=type(error).__name__):
        ask_replicas(Handle(error), "describe")


def test_a_bug_is_not_taken_for_an_absence() -> None:
    with pytest.raises(TypeError):
        ask_replicas(Handle(TypeError("a bug")), "describe")
