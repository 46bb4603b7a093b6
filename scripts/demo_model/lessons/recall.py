"""Values planted under a key, and questions for them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from demo_model.lessons.curriculum import Stage
from demo_model.lessons.facts import FACTS
from demo_model.lessons.turns import Counter, Turn, is_held_out, words

NAMES = words("""Anna Tom Maria Peter Lucy Jack Emma Paul Sara David Julia Mark Nina Oscar Laura
Felix Clara Simon Alice Ben Rosa Victor Helen Martin Grace Leo Eva Max Ruth Karl Mia Hugo Ida
Frank Olga Henry Vera Robert Amy Sam Kate George Lily John Mary James Linda Adam Carol Bruno Diana
Erik Flora Gina Harry Irene Ivan Jane Kevin Lena Louis Marta Nora Otto Pablo Rita Steve Tina
Walter Zoe""")
ATTRIBUTES = ("code", "code", "code", "code", "number", "key", "badge", "password", "room", "pin")
WORD_VALUES = {
    "favorite color": words("red blue green yellow white black orange brown pink gray"),
    "favorite animal": words("dog cat horse cow lion sheep duck bear wolf frog bird"),
}
PLANTS = (
    "The {k} is {v}.",
    "Remember: the {k} is {v}.",
    "Please remember that the {k} is {v}.",
    "Note: the {k} is {v}.",
)
RECALL_QUESTIONS = (
    "What is the {k}?",
    "Tell me the {k}.",
    "Do you remember the {k}?",
    "Please tell me the {k}.",
)
NOTED = ("OK, I will remember that.",)
GENERIC = """The weather is nice today. We walked along the river. She opened the window and
looked outside. The train was late again. He likes to read in the evening. They had bread and
cheese for lunch. It was raining all day. The children played in the garden. My friend lives in a
small house. The shop closes at night. I saw a bird in the tree. The road to the city is long. We
will meet again next week. The book is on the table. He forgot his umbrella at work. She wrote a
letter to her mother. The old clock is slow. There was music in the street. The water is cold in
winter. Nobody knows the answer. The cat sleeps on the chair. Dinner was very good."""
SYLLABLES = words("""ba be bi bo da de di do ka ke ki ko la le li lo ma me mi mo na ne ni no ra
re ri ro sa se si so ta te ti to""")


@dataclass(frozen=True)
class Pair:
    """A planted key and its value, for example "code of Anna" and "4821"."""

    key: str
    value: str

    def plant(self, rng: random.Random) -> str:
        return rng.choice(PLANTS).format(k=self.key, v=self.value)

    def turn(self, rng: random.Random) -> Turn:
        return Turn(
            rng.choice(RECALL_QUESTIONS).format(k=self.key),
            f"The {self.key} is {self.value}.",
            "recall",
        )


def filler_sentences() -> list[str]:
    generic = [s.strip() + "." for s in " ".join(GENERIC.split()).split(".") if s.strip()]
    return generic * 4 + [f.answer for f in FACTS]


FILLER = filler_sentences()


def make_name(rng: random.Random, num_names: int | None) -> str:
    if num_names is not None:
        return rng.choice(NAMES[:num_names])
    return rng.choice(NAMES) if rng.random() < 0.9 else invent_name(rng)


def invent_name(rng: random.Random) -> str:
    return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize()


def make_value(rng: random.Random, name: str, digits: int, held_out: bool) -> str:
    """Digits for a name; from three digits on, one side of the split of name-value combinations."""
    while True:
        value = "".join(rng.choices("0123456789", k=digits))
        if digits < 3 or is_held_out("recall", name, value) == held_out:
            return value


def make_pair(rng: random.Random, name: str, digits: int, held_out: bool) -> Pair:
    if not held_out and rng.random() < 0.15:
        attribute = rng.choice(list(WORD_VALUES))
        return Pair(f"{attribute} of {name}", rng.choice(WORD_VALUES[attribute]))
    value = make_value(rng, name, digits, held_out)
    return Pair(f"{rng.choice(ATTRIBUTES)} of {name}", value)


def make_pairs(rng: random.Random, count: int, stage: Stage) -> list[Pair]:
    names: dict[str, None] = {}
    while len(names) < count:
        names[make_name(rng, stage.num_names)] = None
    return [make_pair(rng, name, rng.choice(stage.digits), False) for name in names]


def recall_test(
    rng: random.Random,
    length: int,
    digits: int,
    window: int,
    count: Counter,
    invented: bool = False,
) -> Turn:
    """A prompt of about `length` tokens whose asked pair lies farther back than `window` tokens."""
    names = rng.sample(NAMES, 4)
    if invented:
        names[0] = invent_name(rng)
    target, *others = (make_pair(rng, name, digits, True) for name in names)
    filler: list[str] = []
    used = sum(count(p.plant(rng)) for p in others) + 40
    while used < length or count(" ".join(filler)) <= window + 16:
        filler.append(rng.choice(FILLER))
        used += count(filler[-1])
    for pair in others:
        filler.insert(rng.randint(0, len(filler)), pair.plant(rng))
    far = [i for i in range(len(filler) + 1) if count(" ".join(filler[i:])) > window + 16]
    filler.insert(rng.choice(far), target.plant(rng))
    asked = target.turn(rng)
    return Turn(" ".join([*filler, asked.user]), asked.model, "recall")


def recall_document(
    rng: random.Random, length: int, digits: int, window: int, count: Counter
) -> tuple[str, list[Pair]]:
    """Sentences that fill a prompt of `length` tokens, a question included, and the four pairs
    planted among them, each farther back than `window` tokens.
    """
    pairs = [make_pair(rng, name, digits, True) for name in rng.sample(NAMES, 4)]
    planted = [pair.plant(rng) for pair in pairs]
    near = fill(rng, window + 16, count)
    left = length - window - 72 - sum(count(f" {sentence}") for sentence in planted)
    far = fill(rng, left, count)
    for sentence in planted:
        far.insert(rng.randint(0, len(far)), sentence)
    return " ".join([*far, *near]), pairs


def fill(rng: random.Random, length: int, count: Counter) -> list[str]:
    """Sentences of about `length` tokens."""
    sentences: list[str] = []
    while length > 0:
        sentences.append(rng.choice(FILLER))
        length -= count(f" {sentences[-1]}")
    return sentences
