"""The tokenizer, trained on the generated text."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from demo_model.lessons.facts import fact_turns
from demo_model.lessons.recall import FILLER, NAMES, make_pair
from demo_model.lessons.sums import sum_turn

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>")
PAD, EOS, BOS, UNK, TURN, TURN_END = range(6)
VOCAB_SIZE = 1280


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE with single digits: frequent words are one token, any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(tokenizer_corpus(), trainer)
    return tokenizer


def tokenizer_corpus(seed: int = 0) -> Iterator[str]:
    """Text whose words the tokenizer should know."""
    rng = random.Random(seed)
    facts = fact_turns(False) + fact_turns(True)
    for turn in facts:
        yield f"{turn.user} {turn.user} {turn.model} {turn.model}"
    for _ in range(4000):
        pair = make_pair(rng, rng.choice(NAMES), 4, False)
        yield " ".join(
            (pair.plant(rng), pair.turn(rng).user, pair.turn(rng).model, rng.choice(FILLER))
        )
        yield f"{sum_turn(rng, False).user} {sum_turn(rng, False).user}"
    yield from ("OK, I will remember that. Repeat: ", "system user model") * 20
