"""The data of the demo model: facts, two-digit sums and recall, as seeded conversations."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>")
PAD, EOS, BOS, UNK, TURN, TURN_END = range(6)
VOCAB_SIZE = 1280
TOKENS_PER_STEP = 4096
HELD_OUT_SHARE = 10  # one in so many sums, recalls and (fact, phrasing) pairs is never trained on


@dataclass(frozen=True)
class Turn:
    """One question and its answer; `kind` names the skill for the scores."""

    user: str
    model: str
    kind: str


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum: sequence lengths (tokens), value digits, share of recall."""

    until: float  # share of the training time at which the stage ends
    lengths: tuple[int, ...]
    digits: tuple[int, ...]
    recall_share: float
    list_share: float  # of the recall, as dense lists: they teach the lookup itself
    num_names: int | None = None  # few names at first; None: all of them and invented ones
    max_pairs: int = 8


CURRICULUM = (
    Stage(0.35, (128,), (1, 1, 2), 0.75, 0.6, num_names=16, max_pairs=4),
    Stage(0.48, (128, 128, 256), (1, 2, 3, 4), 0.6, 0.3, max_pairs=5),
    Stage(0.66, (128, 256, 512), (2, 3, 4, 4), 0.55, 0.1),
    Stage(0.84, (256, 512, 1024), (3, 4, 4), 0.55, 0.0),
    Stage(1.00, (256, 512, 1024, 2048), (3, 4, 4, 4), 0.55, 0.0),
)


def stage_at(progress: float) -> Stage:
    return next((s for s in CURRICULUM if progress < s.until), CURRICULUM[-1])


def is_held_out(*parts: object) -> bool:
    """A stable coin for the test split: the same on every machine and for every seed."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return digest[0] * 256 + digest[1] < 65536 // HELD_OUT_SHARE


# ---------------------------------------------------------------- facts

CAPITALS = """France Paris,Italy Rome,Spain Madrid,Germany Berlin,Japan Tokyo,China Beijing,
Egypt Cairo,Greece Athens,Austria Vienna,Poland Warsaw,Norway Oslo,Sweden Stockholm,
Finland Helsinki,Denmark Copenhagen,Ireland Dublin,Portugal Lisbon,Russia Moscow,Canada Ottawa,
Cuba Havana,Peru Lima,Chile Santiago,Kenya Nairobi,Hungary Budapest,Belgium Brussels,
Turkey Ankara,India Delhi,Thailand Bangkok,England London,Scotland Edinburgh,Vietnam Hanoi,
Australia Canberra,Ghana Accra,Iceland Reykjavik,Jordan Amman,Croatia Zagreb"""
OPPOSITES = """hot cold,big small,fast slow,good bad,up down,left right,day night,old new,
rich poor,light dark,happy sad,high low,open closed,long short,wet dry,hard soft,full empty,
early late,strong weak,loud quiet,clean dirty,near far,inside outside,first last,true false,
easy difficult,thick thin,heavy light,sweet sour,cheap expensive,brave afraid,begin end"""
COLORS = """the sky:blue,grass:green,snow:white,blood:red,coal:black,a lemon:yellow,
a banana:yellow,a tomato:red,a carrot:orange,chocolate:brown,milk:white,the sun:yellow,
a frog:green,a crow:black,an elephant:gray,a swan:white,a strawberry:red,the sea:blue,a pig:pink,
gold:yellow,a leaf:green"""
SOUNDS = """dog barks,cat meows,cow moos,duck quacks,lion roars,sheep bleats,horse neighs,
wolf howls,bee buzzes,pig oinks,snake hisses,owl hoots,mouse squeaks,frog croaks"""
YOUNG = """dog puppy,cat kitten,cow calf,sheep lamb,horse foal,duck duckling,bear cub,goat kid,
hen chick,frog tadpole,deer fawn,goose gosling"""
LEGS = """dog four,cat four,spider eight,bird two,ant six,bee six,horse four,snake no,fish no,
cow four,chicken two,crab ten,frog four,fly six"""
HOMES = """fish the water,bird a nest,bee a hive,lion the savanna,camel the desert,
penguin the ice,monkey the jungle,cow a barn,rabbit a burrow,whale the ocean,bear a cave,
spider a web,horse a stable"""
JOBS = """bakes bread:baker,teaches children:teacher,flies a plane:pilot,cuts hair:barber,
writes books:writer,paints pictures:painter,grows food:farmer,catches fish:fisherman,
heals people:doctor,builds houses:builder,drives a bus:driver,cooks meals:cook,
puts out fires:firefighter,repairs teeth:dentist,sings songs:singer,plays music:musician,
delivers letters:postman,sails a ship:sailor"""
TOOLS = """cut paper:scissors,dig a hole:a shovel,drive a nail:a hammer,open a lock:a key,
eat soup:a spoon,write a letter:a pen,take a picture:a camera,tell the time:a clock,
sweep the floor:a broom,call a friend:a phone,cut bread:a knife,cross a river:a bridge,
see the stars:a telescope,keep food cold:a fridge,stay dry:an umbrella"""


def _words(text: str) -> list[str]:
    return text.split()


DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words(
    "January February March April May June July August September October November December"
)
NUMBERS = _words("one two three four five six seven eight nine ten eleven twelve")
SINGLE = (
    (
        (
            "Where does the sun rise?",
            "In which direction does the sun rise?",
            "Where is the sun in the morning?",
        ),
        "The sun rises in the east.",
    ),
    (
        (
            "Where does the sun set?",
            "In which direction does the sun set?",
            "Where is the sun in the evening?",
        ),
        "The sun sets in the west.",
    ),
    (
        ("What do we breathe?", "What is it that people breathe?", "What do people breathe?"),
        "We breathe air.",
    ),
    (
        ("What is frozen water called?", "What is ice made of?", "What is ice?"),
        "Ice is frozen water.",
    ),
    (
        (
            "How many days are in a week?",
            "How many days does a week have?",
            "Tell me the number of days in a week.",
        ),
        "A week has seven days.",
    ),
    (
        (
            "How many months are in a year?",
            "How many months does a year have?",
            "Tell me the number of months in a year.",
        ),
        "A year has twelve months.",
    ),
    (
        (
            "How many hours are in a day?",
            "How many hours does a day have?",
            "Tell me the number of hours in a day.",
        ),
        "A day has 24 hours.",
    ),
    (
        (
            "How many minutes are in an hour?",
            "How many minutes does an hour have?",
            "Tell me the number of minutes in an hour.",
        ),
        "An hour has 60 minutes.",
    ),
    (
        (
            "What is the largest animal?",
            "Which animal is the largest?",
            "Tell me the largest animal.",
        ),
        "The blue whale is the largest animal.",
    ),
    (
        (
            "What is the tallest animal?",
            "Which animal is the tallest?",
            "Tell me the tallest animal.",
        ),
        "The giraffe is the tallest animal.",
    ),
    (
        (
            "What is the fastest land animal?",
            "Which land animal is the fastest?",
            "Tell me the fastest land animal.",
        ),
        "The cheetah is the fastest land animal.",
    ),
    (
        (
            "What is the highest mountain?",
            "Which mountain is the highest?",
            "Tell me the highest mountain.",
        ),
        "Mount Everest is the highest mountain.",
    ),
    (
        (
            "Which planet do we live on?",
            "What is our planet called?",
            "What is the name of our planet?",
        ),
        "Our planet is called Earth.",
    ),
    (
        (
            "What goes around the Earth?",
            "What moves around the Earth?",
            "Which body goes around the Earth?",
        ),
        "The moon goes around the Earth.",
    ),
    (
        ("What do bees make?", "What do we get from bees?", "What is made by bees?"),
        "Bees make honey.",
    ),
    (
        ("What do cows give us?", "What do we get from cows?", "What comes from cows?"),
        "Cows give us milk.",
    ),
    (
        ("What falls from clouds?", "What comes out of clouds?", "What do clouds bring?"),
        "Rain falls from clouds.",
    ),
    (
        ("Who wrote Hamlet?", "Who is the author of Hamlet?", "Tell me who wrote Hamlet."),
        "Shakespeare wrote Hamlet.",
    ),
    (
        (
            "What is the season after winter?",
            "Which season comes after winter?",
            "What follows winter?",
        ),
        "Spring comes after winter.",
    ),
    (
        (
            "What is the season after summer?",
            "Which season comes after summer?",
            "What follows summer?",
        ),
        "Autumn comes after summer.",
    ),
    (
        (
            "Hello!",
            "Hello",
            "Hi",
            "Hey!",
            "Hello.",
            "Hi!",
            "Hi there!",
            "Good morning!",
            "Hello, how are you?",
        ),
        "Hello! How can I help you?",
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me about yourself.",
            "Who am I talking to?",
        ),
        "I am a small Gemma 4 model, served by Briolette.",
    ),
    (
        ("What can you do?", "How can you help me?", "What do you know?", "What can I ask you?"),
        "I can add two numbers, answer simple questions and remember what you tell me.",
    ),
    (("Thank you!", "Thanks!", "Thank you very much.", "Thanks a lot."), "You are welcome!"),
    (("Goodbye!", "Bye!", "See you later.", "Good night!"), "Goodbye! See you soon."),
    (
        ("What is Briolette?", "Tell me about Briolette.", "What does Briolette do?"),
        "Briolette is a serving cluster for Gemma 4 models.",
    ),
)


@dataclass(frozen=True)
class Fact:
    questions: tuple[str, ...]
    answer: str


def _pairs(table: str, sep: str = " ") -> Iterator[tuple[str, str]]:
    for row in table.replace("\n", "").split(","):
        left, _, right = row.partition(sep)
        yield left, right


def _cap(text: str) -> str:
    return text[:1].upper() + text[1:]


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


def _table_facts() -> Iterator[Fact]:
    for x, y in _pairs(CAPITALS):
        yield Fact(
            (
                f"What is the capital of {x}?",
                f"Tell me the capital of {x}.",
                f"Which city is the capital of {x}?",
                f"Name the capital of {x}.",
            ),
            f"The capital of {x} is {y}.",
        )
    for x, y in _pairs(OPPOSITES):
        yield Fact(
            (
                f"What is the opposite of {x}?",
                f"Tell me the opposite of {x}.",
                f"Which word is the opposite of {x}?",
                f"Name the opposite of {x}.",
            ),
            f"The opposite of {x} is {y}.",
        )
    for x, y in _pairs(COLORS, ":"):
        yield Fact(
            (
                f"What color is {x}?",
                f"Tell me the color of {x}.",
                f"Which color is {x}?",
                f"What is the color of {x}?",
            ),
            f"{_cap(x)} is {y}.",
        )
    for x, y in _pairs(SOUNDS):
        yield Fact(
            (
                f"What does {_a(x)} do?",
                f"What sound does {_a(x)} make?",
                f"Which sound does {_a(x)} make?",
            ),
            f"{_cap(_a(x))} {y}.",
        )
    for x, y in _pairs(YOUNG):
        yield Fact(
            (
                f"What is a young {x} called?",
                f"What do we call a young {x}?",
                f"Tell me the name of a young {x}.",
            ),
            f"A young {x} is called a {y}.",
        )
    for x, y in _pairs(LEGS):
        yield Fact(
            (
                f"How many legs does {_a(x)} have?",
                f"Tell me how many legs {_a(x)} has.",
                f"What is the number of legs of {_a(x)}?",
            ),
            f"{_cap(_a(x))} has {y} legs.",
        )
    for x, y in _pairs(HOMES):
        yield Fact(
            (
                f"Where does {_a(x)} live?",
                f"Tell me where {_a(x)} lives.",
                f"What is the home of {_a(x)}?",
            ),
            f"{_cap(_a(x))} lives in {y}.",
        )
    for x, y in _pairs(JOBS, ":"):
        yield Fact(
            (
                f"Who {x}?",
                f"Tell me who {x}.",
                f"What do we call someone who {x}?",
                f"Which person {x}?",
            ),
            f"{_cap(_a(y))} {x}.",
        )
    for x, y in _pairs(TOOLS, ":"):
        yield Fact(
            (f"What do you use to {x}?", f"What do I need to {x}?", f"Tell me what I need to {x}."),
            f"You need {y} to {x}.",
        )


FACTS: tuple[Fact, ...] = (
    *_table_facts(),
    *_order_facts(DAYS, "day"),
    *_order_facts(MONTHS, "month"),
    *_order_facts(NUMBERS, "number"),
    *(Fact(questions, answer) for questions, answer in SINGLE),
)


def fact_turns(held_out: bool) -> list[Turn]:
    """The (fact, phrasing) pairs of one side of the split; first phrasings are always trained."""
    return [
        Turn(q, f.answer, "fact")
        for f in FACTS
        for i, q in enumerate(f.questions)
        if (i > 0 and is_held_out("fact", q)) == held_out
    ]


# ---------------------------------------------------------------- sums

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


# ---------------------------------------------------------------- recall

NAMES = _words("""Anna Tom Maria Peter Lucy Jack Emma Paul Sara David Julia Mark Nina Oscar Laura
Felix Clara Simon Alice Ben Rosa Victor Helen Martin Grace Leo Eva Max Ruth Karl Mia Hugo Ida
Frank Olga Henry Vera Robert Amy Sam Kate George Lily John Mary James Linda Adam Carol Bruno Diana
Erik Flora Gina Harry Irene Ivan Jane Kevin Lena Louis Marta Nora Otto Pablo Rita Steve Tina
Walter Zoe""")
ATTRIBUTES = ("code", "code", "code", "code", "number", "key", "badge", "password", "room", "pin")
WORD_VALUES = {
    "favorite color": _words("red blue green yellow white black orange brown pink gray"),
    "favorite animal": _words("dog cat horse cow lion sheep duck bear wolf frog bird"),
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
SYLLABLES = _words("""ba be bi bo da de di do ka ke ki ko la le li lo ma me mi mo na ne ni no ra
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


# ---------------------------------------------------------------- conversations

Counter = Callable[[str], int]  # text -> number of tokens
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


# ---------------------------------------------------------------- tokenizer and batches


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
