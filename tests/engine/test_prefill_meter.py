"""The measured time of prefills."""

from __future__ import annotations

import pytest

from engine.prefill_meter import LEAST_TOKENS, REMEMBERED_TOKENS, PrefillMeter

CHUNK = 512
PER_TOKEN, PER_PAIR = 1e-4, 2e-8  # seconds; at 5,000 positions attention takes as long as the rest


def read_prompt(meter: PrefillMeter, num_tokens: int, slowness: float = 1.0) -> None:
    for start in range(0, num_tokens, CHUNK):
        stop = min(start + CHUNK, num_tokens)
        meter.record_step([(start, stop)], 0, slowness * true_s(start, stop))


def true_s(start: int, stop: int) -> float:
    return PER_TOKEN * (stop - start) + PER_PAIR * sum(range(start, stop))


def test_only_steps_that_mostly_computed_prompts_count() -> None:
    meter = PrefillMeter()
    meter.record_step([], 8, 1.0)
    meter.record_step([(0, LEAST_TOKENS - 1)], 0, 1.0)
    meter.record_step([(0, 60), (10, 50)], 50, 1.0)
    assert meter.seconds(0, 100) is None
    meter.record_step([(0, 400)], 100, 2.0)
    assert meter.seconds(0, 500) == pytest.approx(2.0)


def test_a_long_prompt_is_foreseen_from_short_ones_and_a_continuation_from_its_beginning() -> None:
    meter = PrefillMeter()
    read_prompt(meter, 2 * CHUNK)
    for start, stop in ((0, 100), (0, 16_384), (16_384, 32_768), (30_000, 30_100)):
        assert meter.seconds(start, stop) == pytest.approx(true_s(start, stop), rel=0.02)


def test_one_depth_says_nothing_of_others() -> None:
    meter = PrefillMeter()
    for _ in range(3):
        meter.record_step([(0, CHUNK)], 0, 0.1)
    assert meter.seconds(0, 4 * CHUNK) == pytest.approx(0.4)


def test_no_part_is_negative() -> None:
    slower_when_short = PrefillMeter()
    for start, seconds in ((0, 0.2), (CHUNK, 0.1), (8 * CHUNK, 0.05)):
        slower_when_short.record_step([(start, start + CHUNK)], 0, seconds)
    all_attention = PrefillMeter()
    for start, seconds in ((0, 0.001), (CHUNK, 0.1), (8 * CHUNK, 2.0)):
        all_attention.record_step([(start, start + CHUNK)], 0, seconds)
    for meter in (slower_when_short, all_attention):
        for start, stop in ((0, 1), (0, CHUNK), (100_000, 100_001)):
            estimated = meter.seconds(start, stop)
            assert estimated is not None and estimated >= 0


def test_what_was_long_ago_weighs_little() -> None:
    meter = PrefillMeter()
    for slowness in (10.0, 1.0):
        for _ in range(10):
            read_prompt(meter, REMEMBERED_TOKENS, slowness)
    assert meter.seconds(0, 8192) == pytest.approx(true_s(0, 8192), rel=0.02)
