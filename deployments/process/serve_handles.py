"""Questions to the replicas of a deployment through its Serve handle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster.errors import LinkError

ASK_TIMEOUT_S = 2.0


class Handle(Protocol):
    """The part of a Serve DeploymentHandle that is used here."""

    def broadcast(self, method: str) -> Any: ...


def ask_replicas(handle: Handle, method: str) -> list[Mapping[str, Any]]:
    """Call a method of every replica.

    Args:
        handle: The deployment's.
        method: Name of a method without arguments that returns a mapping.

    Returns:
        The answers of the replicas that are alive.

    Raises:
        LinkError: Serve can't ask: there is no replica yet, or the controller doesn't answer.
    """
    try:
        response = handle.broadcast(method)
        answers = response.results(timeout_s=ASK_TIMEOUT_S, return_exceptions=True)
    except (RayError, RayServeException, TimeoutError) as error:
        raise LinkError(f"Serve can't ask for {method} ({type(error).__name__}).") from None
    return [answer for answer in answers if isinstance(answer, Mapping)]
