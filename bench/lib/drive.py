"""Run an EngineCore on some prompts and note when each token comes."""

from __future__ import annotations

import itertools
import time

from bench.lib.timing import Timing
from engine.core import EngineCore
from engine.request import SamplingParams

_request_ids = itertools.count()


def drive(engine: EngineCore, prompts: list[list[int]], num_tokens: int) -> Timing:
    """Greedy tokens for all prompts at once. Raises RuntimeError when a request fails."""
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    times: dict[str, list[float]] = {}
    started = time.perf_counter()
    for prompt in prompts:
        request_id = f"bench-{next(_request_ids)}"
        engine.add(request_id=request_id, prompt_ids=prompt, sampling=sampling)
        times[request_id] = []
    while engine.has_work:
        outputs = engine.step()
        now = time.perf_counter() - started
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
            times[output.request_id] += [now] * len(output.new_token_ids)
    return Timing(list(times.values()))
