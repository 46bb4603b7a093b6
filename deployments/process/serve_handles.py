"""Asking the replicas of a deployment through its Serve handle, any of which may be away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster.errors import LinkError

ASK_S = 2.0


class Handle(Protocol):
    """What is used of a Serve DeploymentHandle."""

    def broadcast(self, method: str) -> Any: ...


def ask_replicas(handle: Handle, method: str) -> list[Mapping[str, Any]]:
    """What the replicas that answer say: a mapping each. Raises LinkError if Serve can't ask: no
    replica yet, a dead one, the controller away.
    """
    try:
        response = handle.broadcast(method)
        answers = response.results(timeout_s=ASK_S, return_exceptions=True)
    except (RayError, RayServeException, TimeoutError) as error:
        raise LinkError(f"Serve can't ask for {method} ({type(error).__name__}).") from None
    return [answer for answer in answers if isinstance(answer, Mapping)]
