"""Questions of all kinds, mixed into conversations of a given length."""

from __future__ import annotations

import random
from dataclasses import replace

from demo_model.lessons.curriculum import Stage
from demo_model.lessons.recall import FILLER, NAMES, NOTED, Pair, make_pairs, make_value
from demo_model.lessons.sums import sum_turn
from demo_model.lessons.turns import Counter, Turn

TURN_TOKENS = 10  # the template's own tokens around one question and answer


def notes_conversation(rng: random.Random, length: int, stage: Stage, count: Counter) -> list[Turn]:
    """One prompt of notes with planted pairs, then questions about them until `length` is full."""
    pairs = make_pairs(rng, rng.randint(1, min(stage.max_pairs, 5 if length <= 128 else 8)), stage)
    share = rng.uniform(0.25, 0.6) if length <= 256 else rng.uniform(0.6, 0.85)
    sentences = [p.plant(rng) for p in pairs]
    used = sum(map(count, sentences))
    filler: list[str] = []
    while used < length * share:
        filler.append(rng.choice(FILLER))
        used += count(filler[-1])
    for sentence in filler:
        sentences.insert(rng.randint(0, len(sentences)), sentence)
    asked = rng.sample(pairs, len(pairs)) + rng.choices(pairs, k=len(pairs) * 2)
    first, *rest = (p.turn(rng) for p in asked)
    return [Turn(" ".join([*sentences, first.user]), first.model, "recall"), *rest]


def list_conversation(rng: random.Random, stage: Stage) -> list[Turn]:
    """Lists of names with values, to be given back in another order: a lookup every few tokens."""
    num_digits = rng.choice(stage.digits)
    names = rng.sample(NAMES[: stage.num_names], min(stage.num_names or 24, 24))
    turns = []
    while names:
        several = [names.pop() for _ in range(min(len(names), rng.randint(1, stage.max_pairs + 2)))]
        items = [f"{name} {make_value(rng, name, num_digits, False)}" for name in several]
        shuffled = ", ".join(rng.sample(items, len(items)))
        turns.append(Turn(f"Codes: {', '.join(items)}.", f"{shuffled}.", "list"))
    return turns


def chat_conversation(
    rng: random.Random, length: int, stage: Stage, count: Counter, facts: list[Turn]
) -> list[Turn]:
    """Pairs told one by one, mixed with sums and facts, and asked for later."""
    pairs = make_pairs(rng, rng.randint(1, min(stage.max_pairs, 3 if length <= 256 else 6)), stage)
    turns: list[Turn] = []
    told: list[Pair] = []
    used = 0
    plant_share = len(pairs) * 40 / length
    while used < length + 40:
        if len(told) < len(pairs) and rng.random() < max(plant_share, 0.3):
            told.append(pairs[len(told)])
            turn = Turn(told[-1].plant(rng), rng.choice(NOTED), "noted")
        elif told and rng.random() < 0.45:
            turn = rng.choice(told).turn(rng)
        else:
            turn = casual(rng, sum_turn(rng, False) if rng.random() < 0.6 else rng.choice(facts))
        turns.append(turn)
        used += count(turn.user) + count(turn.model) + TURN_TOKENS
    return turns


def skill_conversation(
    rng: random.Random, length: int, count: Counter, facts: list[Turn]
) -> list[Turn]:
    """Sums and facts only, sometimes a sequence to repeat (it helps induction heads to form)."""
    turns: list[Turn] = []
    used = 0
    while used < length + 40:
        dice = rng.random()
        if dice < 0.06:
            items = " ".join(rng.choices("0123456789", k=rng.randint(3, 8)))
            turn = Turn(f"Repeat: {items}", items, "repeat")
        else:
            turn = casual(rng, sum_turn(rng, False) if dice < 0.62 else rng.choice(facts))
        turns.append(turn)
        used += count(turn.user) + count(turn.model) + TURN_TOKENS
    return turns


def casual(rng: random.Random, turn: Turn) -> Turn:
    """Sometimes the question as people type it: no capital, no question mark."""
    if rng.random() >= 0.1:
        return turn
    return replace(turn, user=(turn.user[:1].lower() + turn.user[1:]).rstrip("?.!"))


def conversation(
    rng: random.Random, length: int, stage: Stage, count: Counter, facts: list[Turn]
) -> list[Turn]:
    if rng.random() >= stage.recall_share:
        return skill_conversation(rng, length, count, facts)
    if rng.random() < stage.list_share:
        return list_conversation(rng, stage)
    if rng.random() < 0.65:
        return notes_conversation(rng, length, stage, count)
    return chat_conversation(rng, length, stage, count, facts)
