"""The tree of errors that a caller or a machine can cause, with their gRPC status codes.

    BrioletteError                  INTERNAL
    ├── Internal                    INTERNAL
    ├── RequestFailed               INTERNAL, or what the decoder says
    ├── InvalidRequest              INVALID_ARGUMENT
    │   ├── ContextTooLong
    │   ├── InvalidField
    │   └── TooLarge
    ├── UnknownModel                NOT_FOUND
    ├── UnknownSession              NOT_FOUND
    ├── UnknownTenant               NOT_FOUND
    ├── TenantExists                ALREADY_EXISTS
    ├── Unauthenticated             UNAUTHENTICATED
    ├── PermissionDenied            PERMISSION_DENIED
    ├── QuotaExceeded               RESOURCE_EXHAUSTED
    ├── StoreFull                   RESOURCE_EXHAUSTED
    ├── Overloaded                  UNAVAILABLE
    │   └── StalledClient
    ├── Unavailable                 UNAVAILABLE
    ├── LinkError                   UNAVAILABLE
    │   ├── LinkTimeout
    │   └── LinkRefused
    ├── SessionInUse                ABORTED
    ├── ClientGone                  CANCELLED
    ├── DeadlineExceeded            DEADLINE_EXCEEDED
    ├── ConfigError                 FAILED_PRECONDITION
    ├── CheckpointError             FAILED_PRECONDITION
    ├── NotEnoughMemory             FAILED_PRECONDITION
    ├── PortTaken                   FAILED_PRECONDITION
    └── AlreadyRunning              FAILED_PRECONDITION

A class without a status of its own has its parent's. An error's `kind` is the name of its class in
snake case, `quota_exceeded`; metrics, logs and clients tell errors apart by it.
"""

from __future__ import annotations

import re
from typing import ClassVar

MAX_SENTENCE = 500  # characters: gRPC drops an answer with a longer one


class BrioletteError(Exception):
    """Base of every error that reaches a user: one sentence that says what to change.

    Attributes:
        status: Name of the gRPC status code (`grpc.StatusCode`) that the gateway answers with.
        kind: Name of the class in snake case.
        retry_after_s: Seconds after which a retry can succeed, where waiting helps.
        by_kind: Every class of the tree by its kind.
    """

    status: str = "INTERNAL"
    kind: str = "briolette_error"
    retry_after_s: float | None = None
    by_kind: ClassVar[dict[str, type[BrioletteError]]] = {}

    def __init_subclass__(cls) -> None:
        cls.kind = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
        BrioletteError.by_kind[cls.kind] = cls

    @property
    def sentence(self) -> str:
        """The message for a client, cut to MAX_SENTENCE: it may quote much of the request."""
        text = str(self)
        return text if len(text) <= MAX_SENTENCE else f"{text[: MAX_SENTENCE - 1]}…"


class Internal(BrioletteError):
    """A fault of the cluster's own; its log has the details."""


class RequestFailed(BrioletteError):
    """The decoder ended a request without an answer; has the decoder's status and kind."""

    def __init__(self, sentence: str, status: str = "INTERNAL", kind: str = "") -> None:
        super().__init__(sentence)
        self.status = status
        self.kind = kind or status.lower()


class InvalidRequest(BrioletteError):
    """The request can never succeed as it was written."""

    status = "INVALID_ARGUMENT"


class ContextTooLong(InvalidRequest):
    """The prompt and the tokens asked for exceed the model's context or the KV cache."""


class InvalidField(InvalidRequest):
    """A field of an HTTP body is invalid; `param` is its path, None for the body as a whole."""

    def __init__(self, sentence: str, param: str | None = None) -> None:
        super().__init__(sentence)
        self.param = param


class TooLarge(InvalidRequest):
    """The body exceeds gateway.max_message_bytes."""


class UnknownModel(BrioletteError):
    """The request names a model that this cluster doesn't serve."""

    status = "NOT_FOUND"


class UnknownSession(BrioletteError):
    """The tenant has no session of that name."""

    status = "NOT_FOUND"


class UnknownTenant(BrioletteError):
    """There is no tenant of that name."""

    status = "NOT_FOUND"


class TenantExists(BrioletteError):
    """There is a tenant of that name already."""

    status = "ALREADY_EXISTS"


class Unauthenticated(BrioletteError):
    """The call has no key, or one that isn't valid."""

    status = "UNAUTHENTICATED"


class PermissionDenied(BrioletteError):
    """The key is valid, but doesn't permit this call."""

    status = "PERMISSION_DENIED"


class QuotaExceeded(BrioletteError):
    """The tenant has used up its quota; `retry_after_s` says when to retry."""

    status = "RESOURCE_EXHAUSTED"


class StoreFull(BrioletteError):
    """A session doesn't fit into the tenant's budget or the server's memory."""

    status = "RESOURCE_EXHAUSTED"


class Overloaded(BrioletteError):
    """The queue is full; retry later."""

    status = "UNAVAILABLE"


class StalledClient(Overloaded):
    """The client doesn't read what is sent to it."""


class Unavailable(BrioletteError):
    """No process that could answer is alive right now."""

    status = "UNAVAILABLE"


class LinkError(BrioletteError):
    """A link between two processes broke, timed out or refused its handshake; the call can be
    retried elsewhere.
    """

    status = "UNAVAILABLE"


class LinkTimeout(LinkError):
    """Nothing came within the timeout; the link itself is still good."""


class LinkRefused(LinkError):
    """The other side answered the handshake with a refusal; another transport would hear it too."""


class SessionInUse(BrioletteError):
    """Another call uses the session, or has changed it since this one began; retry."""

    status = "ABORTED"


class ClientGone(BrioletteError):
    """The client has closed the connection before the answer was complete."""

    status = "CANCELLED"


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


class AlreadyRunning(BrioletteError):
    """Another supervisor holds this state directory."""

    status = "FAILED_PRECONDITION"
