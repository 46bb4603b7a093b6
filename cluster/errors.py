"""The tree of errors that a caller or a machine can cause, each with its gRPC status."""

from __future__ import annotations

import re
from typing import ClassVar

MAX_SENTENCE = 500  # characters: gRPC drops an answer with a longer one


class BrioletteError(Exception):
    """Base of every error that reaches a user: one sentence that says what to change.

    `status` is the name of the gRPC status code (`grpc.StatusCode`) that the gateway answers with;
    `retry_after_s` is told to the client where waiting helps.
    """

    status: ClassVar[str] = "INTERNAL"
    retry_after_s: float | None = None

    @property
    def sentence(self) -> str:
        """What a client is told, cut where much of what it sent itself stands in it."""
        text = str(self)
        return text if len(text) <= MAX_SENTENCE else f"{text[: MAX_SENTENCE - 1]}…"

    @property
    def kind(self) -> str:
        """The name of the class as metrics and logs show it: `quota_exceeded`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()


class InvalidRequest(BrioletteError):
    """The request can never succeed as it was written."""

    status = "INVALID_ARGUMENT"


class ContextTooLong(InvalidRequest):
    """The prompt and the tokens asked for don't fit the model's context or the KV cache."""


class UnknownModel(BrioletteError):
    """The request names a model that this cluster doesn't serve."""

    status = "NOT_FOUND"


class Unauthenticated(BrioletteError):
    """The call shows no key, or one that isn't valid."""

    status = "UNAUTHENTICATED"


class PermissionDenied(BrioletteError):
    """The key is valid, but not for this."""

    status = "PERMISSION_DENIED"


class QuotaExceeded(BrioletteError):
    """The tenant has used up what it may: `retry_after_s` says when it may go on."""

    status = "RESOURCE_EXHAUSTED"


class Overloaded(BrioletteError):
    """The queue is full: come back later."""

    status = "UNAVAILABLE"


class Unavailable(BrioletteError):
    """No part that could answer is alive right now."""

    status = "UNAVAILABLE"


class UnknownSession(BrioletteError):
    """The tenant has no session of that name."""

    status = "NOT_FOUND"


class SessionInUse(BrioletteError):
    """Another call has the session, or has changed it since this one began: try again."""

    status = "ABORTED"


class StoreFull(BrioletteError):
    """What should be kept is more than the tenant's or the server's memory allows."""

    status = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(BrioletteError):
    """The deadline passed before the answer was complete."""

    status = "DEADLINE_EXCEEDED"


class ConfigError(BrioletteError):
    """The configuration has an unknown key, a missing key or a value out of range."""

    status = "FAILED_PRECONDITION"


class CheckpointError(BrioletteError):
    """A checkpoint is missing, incomplete, of a wrong shape or of an unknown model_type."""

    status = "FAILED_PRECONDITION"


class NotEnoughMemory(BrioletteError):
    """The model or its KV cache doesn't fit on the device."""

    status = "FAILED_PRECONDITION"


class PortTaken(BrioletteError):
    """Another process listens on the address that was asked for."""

    status = "FAILED_PRECONDITION"


class LinkError(BrioletteError):
    """A link between two processes broke, timed out or refused its handshake; the call can be
    retried elsewhere.
    """

    status = "UNAVAILABLE"
