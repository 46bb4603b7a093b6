"""Facts in several phrasings: tables of pairs, sequences, and single ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from demo_model.lessons import fact_tables as tables
from demo_model.lessons.turns import Turn, is_held_out


@dataclass(frozen=True)
class Fact:
    """Several phrasings of a question, and the answer to all of them."""

    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Pattern:
    """How the pairs (x, y) of a table are asked for: `{x}`, `{a_x}` with an article, `{A_x}` too,
    with a capital.
    """

    table: str
    separator: str
    questions: tuple[str, ...]
    answer: str

    def facts(self) -> Iterator[Fact]:
        for row in self.table.replace("\n", "").split(","):
            x, _, y = row.partition(self.separator)
            with_article = {"a_x": _a(x), "A_x": _cap(_a(x)), "A_y": _cap(_a(y))}
            forms = {"x": x, "y": y, "X": _cap(x), **with_article}
            questions = tuple(question.format(**forms) for question in self.questions)
            yield Fact(questions, self.answer.format(**forms))


PATTERNS = (
    Pattern(
        tables.CAPITALS,
        " ",
        (
            "What is the capital of {x}?",
            "Tell me the capital of {x}.",
            "Which city is the capital of {x}?",
            "Name the capital of {x}.",
        ),
        "The capital of {x} is {y}.",
    ),
    Pattern(
        tables.OPPOSITES,
        " ",
        (
            "What is the opposite of {x}?",
            "Tell me the opposite of {x}.",
            "Which word is the opposite of {x}?",
            "Name the opposite of {x}.",
        ),
        "The opposite of {x} is {y}.",
    ),
    Pattern(
        tables.COLORS,
        ":",
        (
            "What color is {x}?",
            "Tell me the color of {x}.",
            "Which color is {x}?",
            "What is the color of {x}?",
        ),
        "{X} is {y}.",
    ),
    Pattern(
        tables.SOUNDS,
        " ",
        (
            "What does {a_x} do?",
            "What sound does {a_x} make?",
            "Which sound does {a_x} make?",
        ),
        "{A_x} {y}.",
    ),
    Pattern(
        tables.YOUNG,
        " ",
        (
            "What is a young {x} called?",
            "What do we call a young {x}?",
            "Tell me the name of a young {x}.",
        ),
        "A young {x} is called a {y}.",
    ),
    Pattern(
        tables.LEGS,
        " ",
        (
            "How many legs does {a_x} have?",
            "Tell me how many legs {a_x} has.",
            "What is the number of legs of {a_x}?",
        ),
        "{A_x} has {y} legs.",
    ),
    Pattern(
        tables.HOMES,
        " ",
        (
            "Where does {a_x} live?",
            "Tell me where {a_x} lives.",
            "What is the home of {a_x}?",
        ),
        "{A_x} lives in {y}.",
    ),
    Pattern(
        tables.JOBS,
        ":",
        (
            "Who {x}?",
            "Tell me who {x}.",
            "What do we call someone who {x}?",
            "Which person {x}?",
        ),
        "{A_y} {x}.",
    ),
    Pattern(
        tables.TOOLS,
        ":",
        ("What do you use to {x}?", "What do I need to {x}?", "Tell me what I need to {x}."),
        "You need {y} to {x}.",
    ),
)


def _order_facts(names: list[str], unit: str) -> Iterator[Fact]:
    for left, right in zip(names, names[1:] + names[:1], strict=True):
        if unit == "number" and right == "one":
            continue
        for word, asked, answer in (("after", left, right), ("before", right, left)):
            yield Fact(
                (
                    f"What {unit} comes {word} {asked}?",
                    f"Which {unit} comes {word} {asked}?",
                    f"Tell me the {unit} {word} {asked}.",
                    f"Which {unit} is {word} {asked}?",
                ),
                f"{_cap(answer)} comes {word} {asked}.",
            )


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _cap(text: str) -> str:
    return text[:1].upper() + text[1:]


FACTS: tuple[Fact, ...] = (
    *(fact for pattern in PATTERNS for fact in pattern.facts()),
    *_order_facts(tables.DAYS, "day"),
    *_order_facts(tables.MONTHS, "month"),
    *_order_facts(tables.NUMBERS, "number"),
    *(Fact(questions, answer) for questions, answer in tables.SINGLE),
)


def fact_turns(held_out: bool) -> list[Turn]:
    """The (fact, phrasing) pairs of one side of the split; first phrasings are always trained."""
    return [
        Turn(q, f.answer, "fact")
        for f in FACTS
        for i, q in enumerate(f.questions)
        if (i > 0 and is_held_out("fact", q)) == held_out
    ]
