"""Conversations as rows of tokens for the training."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

import torch
from tokenizers import Tokenizer
from torch import Tensor

from demo_model.lessons.conversations import conversation, skill_conversation
from demo_model.lessons.curriculum import Stage, stage_at
from demo_model.lessons.facts import fact_turns
from demo_model.lessons.turns import Turn

TOKENS_PER_STEP = 4096


class Batches:
    """Conversations as token rows with a loss weight per token.

    Seed and step number are the whole random state, so that a resumed run needs no other.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.digits = {tokenizer.token_to_id(digit) for digit in "0123456789"}
        self.facts = fact_turns(held_out=False)
        self.count = lru_cache(100_000)(
            lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
        )

    def encode(self, turns: Sequence[Turn]) -> tuple[list[int], list[float]]:
        pieces: list[tuple[str, float]] = [("<bos>", 0.0)]
        for turn in turns:
            pieces.append((f"<|turn>user\n{turn.user}<turn|>\n<|turn>model\n", 0.1))
            pieces.append((f"{turn.model}<turn|>", 1.0))
            pieces.append(("\n", 0.1))
        encoded = self.tokenizer.encode_batch(
            [text for text, _ in pieces], add_special_tokens=False
        )
        ids = [i for e in encoded for i in e.ids]
        weights = [w for e, (_, w) in zip(encoded, pieces, strict=True) for _ in e.ids]
        if turns[0].kind == "list":  # the order of the names is chance: only the values teach
            weights = [
                w if i in self.digits or w < 1 else 0.2 for i, w in zip(ids, weights, strict=True)
            ]
        return ids, weights

    def row(self, rng: random.Random, length: int, stage: Stage) -> tuple[list[int], list[float]]:
        turns = conversation(rng, length, stage, self.count, self.facts)
        ids, weights = self.encode(turns)
        while len(ids) < length + 1:
            more, more_weights = self.encode(
                skill_conversation(rng, length - len(ids), self.count, self.facts)
            )
            ids, weights = ids + more[1:], weights + more_weights[1:]
        return ids[: length + 1], weights[: length + 1]

    def step(self, step: int, progress: float) -> tuple[Tensor, Tensor]:
        """Token ids and weights, both [num_rows, length + 1]."""
        rng = random.Random(f"{self.seed}-{step}")
        stage = stage_at(progress)
        length = rng.choice(stage.lengths)
        rows = [self.row(rng, length, stage) for _ in range(TOKENS_PER_STEP // length)]
        weights = torch.tensor([row_weights for _, row_weights in rows])
        return torch.tensor([ids for ids, _ in rows]), weights
