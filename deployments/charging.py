"""Work of the decoder at a tenant's expense."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from cluster.errors import BrioletteError
from cluster.tenancy import Lease
from deployments.remote_decoder import RemoteDecoder
from protos.briolette.v1.stream_pb2 import Add, Output


async def charged(decoder: RemoteDecoder, add: Add, lease: Lease) -> AsyncGenerator[Output, None]:
    """What `decoder.generate` brings: the prompt is charged before, the answer as it comes. A
    prompt that nothing could be done with, for no fault of the tenant's, is given back.

    Raises QuotaExceeded, InvalidRequest where no minute has room for the prompt.
    """
    num_prompt_tokens, is_begun = len(add.prompt_ids), False
    lease.charge(num_prompt_tokens)
    try:
        async with aclosing(decoder.generate(add)) as outputs:
            async for output in outputs:
                is_begun = True
                lease.owe(len(output.generation.token_ids))
                yield output
    except BrioletteError as error:
        if error.status == "UNAVAILABLE" and not is_begun:
            lease.owe(-num_prompt_tokens)
        raise
