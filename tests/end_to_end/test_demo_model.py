"""The shipped demo weights, asked what training never showed them: sums, and values far back."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from demo_model.lessons.recall import recall_test
from demo_model.lessons.sums import sum_turns_held_out_both_ways
from demo_model.lessons.turns import Turn
from demo_model.shape import WINDOW

from cluster.config import DEMO_MODEL_DIR, Config
from deployments.loading import ModelSource, load_engine, load_local_experts
from engine.core import EngineCore
from engine.request import SamplingParams


@pytest.fixture(scope="module")
def engine() -> EngineCore:
    settings = {
        "model": str(DEMO_MODEL_DIR),
        "device": "cpu",
        "engine": {"kv_bytes": 64 << 20, "max_model_len": 1024},
    }
    config = Config.load(None, settings)
    source = ModelSource.open(config)
    return load_engine(config, source, load_local_experts(config, source))


def share_right(engine: EngineCore, turns: Sequence[Turn]) -> float:
    """Return the turns whose whole answer greedy decoding gives."""
    assert engine.tokenizer is not None
    for index, turn in enumerate(turns):
        engine.add(
            request_id=str(index),
            prompt_ids=engine.tokenizer.apply_chat_template(
                [{"role": "user", "content": turn.user}]
            ),
            sampling=SamplingParams(temperature=0.0, max_tokens=32),
        )
    answers = [""] * len(turns)
    while engine.has_work:
        for output in engine.step():
            answers[int(output.request_id)] += output.text
    rights = [answer == turn.model for answer, turn in zip(answers, turns, strict=True)]
    return sum(rights) / len(turns)


def test_sums_that_training_saw_in_neither_order(engine: EngineCore) -> None:
    rng = random.Random(5)
    turns = rng.sample(sum_turns_held_out_both_ways(rng), 12)
    assert share_right(engine, turns) >= 0.9


def test_recall_from_beyond_the_sliding_window(engine: EngineCore) -> None:
    rng, tokenizer = random.Random(5), engine.tokenizer
    assert tokenizer is not None
    turns = [
        recall_test(rng, num_tokens, 4, WINDOW, lambda text: len(tokenizer.encode(text)))
        for num_tokens in (128, 256, 512, 768)
        for _ in range(3)
    ]
    assert share_right(engine, turns) >= 0.9
