"""TTFT of each turn of a conversation, before and after a restart, beside llama.cpp's server.

`python -m bench.memory.conversation` has the same conversation with the engine and its store in
Redis, and with llama.cpp and its own prompt cache: a long opening, then turns that add to it, and
to the answers that each side gave itself. In the middle everything is ended and started again: the
engine's process and its Redis server, or llama.cpp's.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from bench.lib.card import Check, pin, report, table
from bench.lib.models import NUM_SPECIAL_IDS, BenchModel, load_models, random_prompts
from bench.lib.peers import LlamaCpp, NotMeasured
from bench.memory.stored import Stored, stored_engine
from cluster.store.redis_server import RedisServer
from engine.request import SamplingParams

MODEL = "moe-50m"
OPENING, QUESTION, ANSWER = 2048, 64, 48  # tokens
NUM_TURNS, NUM_THREADS = 10, 2
CONTEXT = 4096
STORE_BYTES = 1 << 30
OURS, LLAMA_CPP = "Briolette, in-process", "llama.cpp"


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer; times in seconds."""

    num_prompt_tokens: int
    num_cached_tokens: int
    ttft_s: float
    answer_ids: list[int]

    def to_json(self) -> dict[str, float]:
        return {
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "ttft_s": self.ttft_s,
        }


class Speaker(Protocol):
    """One side of a conversation: it answers a prompt of token ids greedily."""

    def answer(self, prompt_ids: list[int], num_tokens: int) -> Turn: ...


OpenSpeaker = Callable[[], contextlib.AbstractContextManager[Speaker]]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the card, return the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=NUM_TURNS, help="at most 18")
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    args = parser.parse_args(argv)
    pin(NUM_THREADS)
    results: dict[str, Any] = {"restart_before_turn": args.turns // 2 + 1, "not_measured": {}}
    [model] = load_models([MODEL])
    with tempfile.TemporaryDirectory(prefix="briolette-") as directory:
        makers = {
            OURS: partial(open_ours, model, Path(directory)),
            LLAMA_CPP: partial(open_llama_cpp, model),
        }
        for name, make in makers.items():
            try:
                turns = converse(make, questions(model, args.turns))
            except NotMeasured as reason:
                results["not_measured"][name] = str(reason)
            else:
                results[name] = [turn.to_json() for turn in turns]
    return report("conversation", results, checks(results), card(results), keep=args.keep)


def questions(model: BenchModel, num_turns: int) -> list[list[int]]:
    """What is added to the conversation at each turn; the first is the long opening."""
    [opening] = random_prompts(model, 1, OPENING, seed=1)
    return [opening, *random_prompts(model, num_turns - 1, QUESTION, seed=2)]


def converse(make: OpenSpeaker, asked: Sequence[list[int]]) -> list[Turn]:
    """All turns; half of them in one process, half in a second one that knows what a disk kept."""
    half = len(asked) // 2
    before = in_new_process(make, [], asked[:half])
    history = [i for q, turn in zip(asked, before, strict=False) for i in (*q, *turn.answer_ids)]
    return before + in_new_process(make, history, asked[half:])


def in_new_process(make: OpenSpeaker, history: list[int], asked: Sequence[list[int]]) -> list[Turn]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(live, make, history, asked).result()


def live(make: OpenSpeaker, history: list[int], asked: Sequence[list[int]]) -> list[Turn]:
    """What one process does: get warm with an unrelated prompt, then go on with a conversation."""
    turns: list[Turn] = []
    with make() as speaker:
        speaker.answer(random.Random(0).choices(range(NUM_SPECIAL_IDS, 1000), k=100), 4)
        for question in asked:
            history = [*history, *question]
            turns.append(speaker.answer(history, ANSWER))
            history += turns[-1].answer_ids
    return turns


def checks(results: dict[str, Any]) -> list[Check]:
    """The first turn after the restart: what remembering is for."""
    at = results["restart_before_turn"] - 1
    ours, theirs = (
        results[name][at]["ttft_s"] if name in results else None for name in (OURS, LLAMA_CPP)
    )
    ratio = theirs / ours if ours and theirs else None
    return [Check("first turn after a restart: llama.cpp's TTFT / ours", ratio, "x", 1)]


def card(results: dict[str, Any]) -> list[str]:
    names = [name for name in (OURS, LLAMA_CPP) if name in results]
    rows = []
    for i in range(len(results[names[0]]) if names else 0):
        turns = [results[name][i] for name in names]
        mark = " (after the restart)" if i + 1 == results["restart_before_turn"] else ""
        cells = [f"{turn['ttft_s'] * 1e3:.0f} ({turn['num_cached_tokens']})" for turn in turns]
        rows.append([f"{i + 1}{mark}", str(turns[0]["num_prompt_tokens"]), *cells])
    notes = [
        "llama.cpp keeps prompts in its memory; nothing of it outlives the process by itself.",
        *(f"{name}: not measured. {why}" for name, why in results["not_measured"].items()),
    ]
    title = f"TTFT of each turn in ms (tokens that were remembered), {MODEL}, {NUM_THREADS} threads"
    return [title, *table(["turn", "prompt tokens", *names], rows), *notes]


class OurSpeaker:
    """The engine with local experts, its blocks in Redis."""

    def __init__(self, stored: Stored) -> None:
        self._engine = stored.engine

    def answer(self, prompt_ids: list[int], num_tokens: int) -> Turn:
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        answer_ids: list[int] = []
        ttft_s, num_cached = 0.0, 0
        start = time.perf_counter()
        self._engine.add(request_id="turn", prompt_ids=prompt_ids, sampling=sampling)
        while self._engine.has_work:
            for output in self._engine.step():
                if not answer_ids:
                    ttft_s, num_cached = time.perf_counter() - start, output.num_cached_tokens
                answer_ids += output.new_token_ids
        assert len(answer_ids) == num_tokens, "the engine stopped early"
        return Turn(len(prompt_ids), num_cached, ttft_s, answer_ids)


@contextlib.contextmanager
def open_ours(model: BenchModel, data_dir: Path) -> Iterator[Speaker]:
    """With a Redis server of its own, which finds the file of the one before it."""
    options = {"engine.max_model_len": CONTEXT}
    with (
        RedisServer(data_dir, STORE_BYTES) as server,
        stored_engine(model, NUM_THREADS, server.address, options) as stored,
    ):
        yield OurSpeaker(stored)
        stored.flush()


@contextlib.contextmanager
def open_llama_cpp(model: BenchModel) -> Iterator[Speaker]:
    """Raises NotMeasured where it can't run."""
    yield LlamaCppSpeaker(model)


class LlamaCppSpeaker:
    """llama.cpp's server with its defaults, which keep a prompt's KV in its slot and in memory."""

    def __init__(self, model: BenchModel) -> None:
        self._server = LlamaCpp(model, NUM_THREADS).make_server(1, CONTEXT)

    def answer(self, prompt_ids: list[int], num_tokens: int) -> Turn:
        start = time.perf_counter()
        answer = self._server.handle_completions(
            {
                "prompt": prompt_ids,
                "n_predict": num_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "cache_prompt": True,
            }
        )
        took_s, timings = time.perf_counter() - start, answer["timings"]
        # Each token of the bench's random models is a word like w123.
        answer_ids = [int(word) for word in re.findall(r"w(\d+)", answer["choices"][0]["text"])]
        assert len(answer_ids) == num_tokens, "the server stopped early"
        ttft_s = took_s - timings["predicted_ms"] / 1e3
        return Turn(len(prompt_ids), timings["cache_n"], ttft_s, answer_ids)


if __name__ == "__main__":
    main()
