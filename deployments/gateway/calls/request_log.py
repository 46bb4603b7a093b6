"""What is told of calls: counters, and a line of JSON for each, without a word of what it said."""

from __future__ import annotations

import json
import logging
import time
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

from cluster.errors import BrioletteError, StalledClient
from cluster.metrics import Metrics
from cluster.tenants.admission import Admission, Lease
from deployments.gateway.calls.client_call import ClientCall

FILE = "requests.jsonl"
MAX_BYTES = 16 << 20  # of a file; the last ones are kept beside it
NUM_OLD_FILES = 4
NOBODY = "(none)"  # who isn't let in; no tenant can have this name
GIVEN_UP = {"CANCELLED": "client", "DEADLINE_EXCEEDED": "deadline"}  # by how a call has ended


class RequestLog:
    """Is told of the beginning and the end of every call, whichever dialect it came in."""

    def __init__(self, metrics: Metrics, folder: Path | None) -> None:
        """`folder` is where to write; None: calls are counted only."""
        self._metrics = metrics
        self._lines = logging.Logger("requests")
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        self._lines.addHandler(
            RotatingFileHandler(path, maxBytes=MAX_BYTES, backupCount=NUM_OLD_FILES, delay=True)
        )

    def admit(self, admission: Admission, key: str | None, method: str, request_id: str) -> Lease:
        """Whoever shows this key. Raises what keeps it out, which is the end of the call."""
        try:
            return admission.admit(key)
        except BrioletteError as error:
            self._count(NOBODY, method, error.status, error.kind)
            self._write(method, error.status, error.kind, {"request_id": request_id})
            raise

    def began(self, call: ClientCall, method: str) -> None:
        """A call was let in; it will end."""
        self._metrics.gateway_streams(call.tenant, method).inc()

    def ended(
        self,
        call: ClientCall,
        method: str,
        status: str,
        error: BrioletteError | None = None,
    ) -> None:
        """A call has ended with the name of a gRPC status.

        Written are those that generated or failed: what others ask once a second is no news.
        """
        is_fine = status in ("OK", "CANCELLED")
        kind = "" if is_fine else status.lower() if error is None else error.kind
        self._count(call.tenant, method, status, kind)
        self._metrics.gateway_streams(call.tenant, method).dec()
        given_up = "stalled" if isinstance(error, StalledClient) else GIVEN_UP.get(status)
        if given_up is not None:
            self._metrics.gateway_aborted_total(call.tenant, method, given_up).inc()
        if kind or call.stats.model:
            self._write(method, status, kind, _facts(call))

    def close(self) -> None:
        """Close the file."""
        for handler in self._lines.handlers:
            handler.close()

    def _count(self, tenant: str, method: str, status: str, kind: str) -> None:
        self._metrics.gateway_requests_total(tenant, method, status).inc()
        if kind:
            self._metrics.gateway_errors_total(tenant, method, kind).inc()

    def _write(self, method: str, status: str, kind: str, facts: dict[str, object]) -> None:
        if self._lines.handlers:
            level = "ERROR" if status == "INTERNAL" else "WARNING" if kind else "INFO"
            head = {"time": _now(), "level": level, "method": method, "status": status}
            self._lines.info(json.dumps({**head, "error": kind, **facts}))


def _facts(call: ClientCall) -> dict[str, object]:
    """What can be told of a call without its text, its keys or its session's name."""
    usage, timings = call.stats.usage, call.stats.timings
    return {
        "request_id": call.request_id,
        "tenant": call.tenant,
        "model": call.stats.model,
        "prompt_tokens": usage.prompt_tokens,
        "output_tokens": usage.output_tokens,
        "cached_tokens": usage.cached_tokens,
        "queue_s": round(timings.queue_s, 6),
        "ttft_s": round(timings.ttft_s, 6),
        "total_s": round(time.monotonic() - call.started_at, 6),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
