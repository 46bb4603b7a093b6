"""The measured speed of prefills."""

from __future__ import annotations

import pytest

from engine.prefill_meter import LEAST_TOKENS, REMEMBERED_TOKENS, PrefillMeter


def test_only_steps_that_mostly_computed_prompts_count() -> None:
    meter = PrefillMeter()
    meter.saw_step(0, 8, 1.0)
    meter.saw_step(LEAST_TOKENS - 1, 0, 1.0)
    meter.saw_step(100, 50, 1.0)
    assert meter.tokens_per_s is None
    meter.saw_step(400, 100, 2.0)
    meter.saw_step(500, 0, 0.5)
    assert meter.tokens_per_s == 400.0


def test_what_was_long_ago_weighs_little() -> None:
    meter = PrefillMeter()
    for _ in range(10):
        meter.saw_step(REMEMBERED_TOKENS, 0, 10.0)
    for _ in range(10):
        meter.saw_step(REMEMBERED_TOKENS, 0, 1.0)
    assert meter.tokens_per_s == pytest.approx(REMEMBERED_TOKENS, rel=0.02)
