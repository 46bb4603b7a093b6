"""Work of the decoder at a tenant's expense."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from cluster.errors import BrioletteError
from cluster.tenancy import Lease, Tenant
from deployments.calls.remote_decoder import RemoteDecoder
from protos.briolette.v1.stream_pb2 import Add, Output


async def charged(
    decoder: RemoteDecoder, add: Add, prompt_ids: Sequence[int], lease: Lease
) -> AsyncGenerator[Output, None]:
    """What `decoder.generate` brings: the prompt is charged before, the answer as it comes. A
    prompt that nothing could be done with, for no fault of the tenant's, is given back.

    Raises QuotaExceeded, InvalidRequest where no minute has room for the prompt.
    """
    num_prompt_tokens, is_begun = len(prompt_ids), False
    lease.charge(num_prompt_tokens)
    try:
        async with aclosing(decoder.generate(add, prompt_ids)) as outputs:
            async for output in outputs:
                is_begun = True
                lease.owe(len(output.generation.token_ids))
                yield output
    except BrioletteError as error:
        if error.status == "UNAVAILABLE" and not is_begun:
            lease.owe(-num_prompt_tokens)
        raise


class CallLease:
    """Of all answers to one call, whose lease is held meanwhile: one request in flight. Their
    prompts together are charged as one prompt would be.
    """

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._num_charged = 0

    @property
    def tenant(self) -> Tenant:
        return self._lease.tenant

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def charge(self, num_tokens: int) -> None:
        """Raises with nothing charged for any of the prompts: the call ends then."""
        num_tokens += self._num_charged
        self._lease.owe(-self._num_charged)
        self._num_charged = 0
        self._lease.charge(num_tokens)
        self._num_charged = num_tokens

    def owe(self, num_tokens: int) -> None:
        self._lease.owe(num_tokens)
        self._num_charged += min(num_tokens, 0)


class NextChoiceLease(CallLease):
    """Of another answer to a prompt that is charged for the first one."""

    def charge(self, num_tokens: int) -> None:
        pass

    def owe(self, num_tokens: int) -> None:
        self._lease.owe(max(num_tokens, 0))
