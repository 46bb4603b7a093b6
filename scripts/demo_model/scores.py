"""What the model has learned, on questions that were held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Gemma4ForCausalLM

from demo_model.batches import Batches
from demo_model.lessons.facts import fact_turns
from demo_model.lessons.recall import recall_test
from demo_model.lessons.sums import sum_turn, sum_turns_held_out_both_ways
from demo_model.lessons.turns import Counter, Turn
from demo_model.router_watch import RouterWatch
from demo_model.shape import WINDOW
from demo_model.tokenizer import PAD


@dataclass
class Score:
    task: str
    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked


def test_sets(count: Counter) -> dict[str, list[Turn]]:
    """Questions held out: pairs of numbers, name-value combinations, phrasings."""
    rng = random.Random(2026)
    tests = {
        "two-digit sums, held-out pairs": [sum_turn(rng, True) for _ in range(500)],
        "two-digit sums, held out in both orders": sum_turns_held_out_both_ways(rng),
        "facts, trained phrasings": fact_turns(held_out=False),
        "facts, held-out phrasings": fact_turns(held_out=True),
    }
    for length in (128, 256, 512, 1024, 2048):
        tests[f"recall of a four-digit value, prompt of about {length} tokens"] = [
            recall_test(rng, length, 4, WINDOW, count) for _ in range(100)
        ]
    tests["recall for an invented name, prompt of about 512 tokens"] = [
        recall_test(rng, 512, 4, WINDOW, count, invented=True) for _ in range(100)
    ]
    return tests


@torch.no_grad()
def num_right(
    model: Gemma4ForCausalLM, batches: Batches, turns: Sequence[Turn], num_rows: int = 16
) -> int:
    """Turns whose whole answer greedy decoding gives: each token is the arg max of its logits."""
    right = 0
    encoded = [batches.encode([turn]) for turn in sorted(turns, key=lambda t: len(t.user))]
    for start in range(0, len(encoded), num_rows):
        rows = encoded[start : start + num_rows]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([i + [PAD] * (width - len(i)) for i, _ in rows])
        answer = torch.tensor(
            [[w == 1.0 for w in ws] + [False] * (width - len(ws)) for _, ws in rows]
        )
        guess = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        right += int(((guess == ids[:, 1:]) | ~answer[:, 1:]).all(-1).sum())
    return right


def quick_scores(model: Gemma4ForCausalLM, batches: Batches) -> dict[str, float]:
    rng = random.Random(1)
    tests = {
        "sum": [sum_turn(rng, True) for _ in range(64)],
        "fact": rng.sample(fact_turns(True), 48),
    }
    for digits, length in ((4, 110), (4, 256), (4, 512), (4, 1024), (4, 2048)):
        window = 20 if length == 110 else WINDOW
        tests[f"recall{digits}@{length}"] = [
            recall_test(rng, length, digits, window, batches.count)
            for _ in range(32 if length < 1024 else 16)
        ]
    return {
        name: round(num_right(model, batches, turns, 8) / len(turns), 3)
        for name, turns in tests.items()
    }


@torch.no_grad()
def measure_load(model: Gemma4ForCausalLM, batches: Batches, num_steps: int = 6) -> Tensor:
    watch = RouterWatch()
    watch.attach(model)
    loads = []
    for step in range(num_steps):
        ids, _ = batches.step(10**9 + step, progress=0.5)  # steps that no training run reaches
        watch.clear()
        model(input_ids=ids, use_cache=False)
        loads.append(watch.load())
    return torch.stack(loads).mean(0)
