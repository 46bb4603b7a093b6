"""Work of the decoder at a tenant's expense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.errors import BrioletteError, DeadlineExceeded
from deployments.gateway.calls.call import Call
from protos.briolette.v1.inference_pb2 import Generation


@contextmanager
def charged(call: Call, num_prompt_tokens: int) -> Iterator[Callable[[Generation], None]]:
    """Around all answers to a call: its prompts are charged before, and every piece as it comes by
    the function that this gives. Prompts that nothing could be done with, for no fault of the
    tenant's, are given back.

    Raises DeadlineExceeded, QuotaExceeded, and InvalidRequest where no minute has room for them.
    """
    is_begun, lease = False, call.lease

    def owe(piece: Generation) -> None:
        nonlocal is_begun
        is_begun = True
        lease.charge_output(len(piece.token_ids))

    if call.time_remaining_s is not None and call.time_remaining_s <= 0:
        raise DeadlineExceeded("The deadline passed before the answer could begin.")
    lease.charge(num_prompt_tokens)
    try:
        yield owe
    except BrioletteError as error:
        if error.status == "UNAVAILABLE" and not is_begun:
            lease.refund(num_prompt_tokens)
        raise
