"""128K tokens of context: the memory that was calculated is enough, and windows are left behind."""

from __future__ import annotations

import json

import pytest
import torch

from bench.memory.long_context import (
    BUDGET,
    LONG,
    NUM_ANSWER,
    OTHER_BYTES,
    SMALL,
    main,
    measure_memory,
    sliding_alone,
)
from cluster.errors import NotEnoughMemory
from cluster.spec import ModelSpec
from engine.cache.kv_sizing import size_kv_cache

TINY = SMALL | {"hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "global_head_dim": 16}
SPEC = ModelSpec.from_config(TINY | {"sliding_window": 100})


# Global attention over 128K takes a minute on a busy machine: here over 64K, in the bench over all.
@pytest.mark.parametrize("spec, num_tokens", [(SPEC, LONG // 2), (sliding_alone(SPEC), LONG)])
def test_a_long_prompt_passes_through_a_cache_of_the_calculated_size(
    spec: ModelSpec, num_tokens: int
) -> None:
    torch.set_num_threads(1)
    memory = measure_memory(spec, num_tokens)
    assert memory.kv_bytes == memory.calculated_bytes
    assert memory.window_blocks == 1 + 7  # 99 positions back may reach into seven blocks before
    assert memory.most_sliding <= memory.window_blocks
    num_blocks = -(-(num_tokens + NUM_ANSWER - 1) // 16)  # the last token isn't computed
    assert memory.most_global == (num_blocks if spec is SPEC else 0)
    assert memory.unfreed_bytes > 5 * memory.kv_bytes
    assert memory.other_bytes < OTHER_BYTES
    with pytest.raises(NotEnoughMemory):  # a byte less is refused
        size_kv_cache(
            spec,
            memory.calculated_bytes - 1,
            num_tokens + NUM_ANSWER,
            dtype=torch.float32,
            max_num_batched_tokens=BUDGET,
        )


def test_the_bench_measures_both_parts(capsys: pytest.CaptureFixture[str]) -> None:
    summary = main(["--no-keep", "--tokens", "8192", "--repeats", "1"])
    assert [check["name"] for check in summary["checks"] if check["value"] is None] == []
    assert summary["results"]["memory"]["num_tokens"] == 8192
    assert 0 < summary["results"]["sliding"]["long_us"] < 1e6
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary
