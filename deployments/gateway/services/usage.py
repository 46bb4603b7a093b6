"""Usage by tenant and day: counted as the decoder tells it, reported to whoever may know."""

from __future__ import annotations

from datetime import date, timedelta

from cluster.errors import InvalidRequest, PermissionDenied
from cluster.tenants.usage import DayUsed, UsageBooks, Used, today
from deployments.gateway.calls.client_call import ClientCall
from deployments.gateway.calls.tenant_threads import TenantThreads
from protos.briolette.v1.admin_pb2 import DayUsage, GetUsageRequest, GetUsageResponse
from protos.briolette.v1.stream_pb2 import Spent

DEFAULT_DAYS = 30
MAX_DAYS = 1000  # of one report
FIRST_DAY = date(2000, 1, 1)


class UsageService:
    """The books behind `GetUsage`."""

    def __init__(self, books: UsageBooks) -> None:
        self._books = books
        self._threads = TenantThreads("usage", num_threads=4, num_each=2, max_waiting=16)

    def count(self, spent: Spent) -> None:
        """A request has ended."""
        usage = spent.usage
        used = Used(
            requests=spent.requests,
            prompt_tokens=usage.prompt_tokens,
            output_tokens=usage.output_tokens,
            cached_tokens=usage.cached_tokens,
            saved_prefill_s=usage.saved_prefill_s,
        )
        self._books.count(spent.tenant, used)

    async def get_usage(self, request: GetUsageRequest, call: ClientCall) -> GetUsageResponse:
        """A tenant sees its own days, an admin everybody's."""
        until = _day(request.until, today())
        since = _day(request.since, until - timedelta(days=DEFAULT_DAYS))
        if (until - since).days >= MAX_DAYS:
            raise InvalidRequest(f"A report has at most {MAX_DAYS} days; ask for fewer at a time.")
        tenants = _tenants(request.tenant, call)
        days = await self._threads.run(call.tenant, self._books.read, since, until, tenants)
        return GetUsageResponse(days=map(_to_message, days))

    def close(self) -> None:
        """Write what isn't written yet. Waits for Redis."""
        self._threads.close()
        self._books.close()


def _tenants(asked: str, call: ClientCall) -> tuple[str, ...] | None:
    """Return the tenant whose days to report; None reports all tenants."""
    if call.lease.tenant.is_admin:
        return (asked,) if asked else None
    if asked not in ("", call.tenant):
        raise PermissionDenied(f"The tenant {call.tenant} may see its own usage only.")
    return (call.tenant,)


def _day(text: str, default: date) -> date:
    if not text:
        return default
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(f"{text!r} is no day; write it as 2026-11-24.") from None
    if day < FIRST_DAY:
        raise InvalidRequest(
            f"There is no usage of {text}; the first day to ask for is {FIRST_DAY}."
        )
    return day


def _to_message(day: DayUsed) -> DayUsage:
    used = day.used
    return DayUsage(
        tenant=day.tenant,
        day=day.day.isoformat(),
        requests=used.requests,
        prompt_tokens=used.prompt_tokens,
        output_tokens=used.output_tokens,
        cached_tokens=used.cached_tokens,
        saved_prefill_s=used.saved_prefill_s,
    )
