"""Two-digit sums."""

from __future__ import annotations

import random

from demo_model.lessons.turns import Turn, is_held_out

SUM_QUESTIONS = (
    "What is {a} + {b}?",
    "Add {a} and {b}.",
    "How much is {a} + {b}?",
    "What is the sum of {a} and {b}?",
    "Please add {a} and {b}.",
    "{a} + {b} = ?",
    "{a} + {b}",
    "What is {a}+{b}?",
    "{a}+{b}",
)


def sum_turn(rng: random.Random, held_out: bool) -> Turn:
    least = 1 if not held_out and rng.random() < 0.15 else 10
    while True:
        a, b = rng.randint(least, 99), rng.randint(least, 99)
        if is_held_out("sum", a, b) == held_out:
            question = rng.choice(SUM_QUESTIONS).format(a=a, b=b)
            return Turn(question, f"{a} + {b} is {a + b}.", "sum")


def sum_turns_held_out_both_ways(rng: random.Random) -> list[Turn]:
    """Every pair that training saw in neither order."""
    return [
        Turn(rng.choice(SUM_QUESTIONS).format(a=a, b=b), f"{a} + {b} is {a + b}.", "sum")
        for a in range(10, 100)
        for b in range(10, 100)
        if is_held_out("sum", a, b) and is_held_out("sum", b, a)
    ]
