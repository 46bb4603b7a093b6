"""How blocks are cut into values, and where a request can resume with those that are there."""

from __future__ import annotations

import random

import pytest

from cluster.spec import AttentionKind
from deployments.decoder.kv.values import MAX_RUN_BLOCKS, RUN_BYTES, BlockRun, ValueLayout

GLOBAL, SLIDING = AttentionKind.GLOBAL, AttentionKind.SLIDING


def test_a_run_has_about_two_megabytes_but_never_too_many_blocks() -> None:
    large = ValueLayout.of({GLOBAL: 163_840, SLIDING: 3_276_800}, 64)
    assert large.run_blocks == 12 and large.num_bytes(large.global_run(12)) <= RUN_BYTES
    assert ValueLayout.of({GLOBAL: 3 * RUN_BYTES}, 64).run_blocks == 1
    assert ValueLayout.of({GLOBAL: 512}, 64).run_blocks == MAX_RUN_BLOCKS


def test_what_a_request_reads() -> None:
    layout = ValueLayout({GLOBAL: 1, SLIDING: 1}, window_blocks=2, run_blocks=4)
    runs = [BlockRun(GLOBAL, 0, 4), BlockRun(GLOBAL, 4, 8), BlockRun(GLOBAL, 8, 9)]
    window = [BlockRun(SLIDING, 7, 8), BlockRun(SLIDING, 8, 9)]
    assert layout.needed(0, 9) == runs + window
    assert layout.needed(5, 9) == runs[1:] + window
    assert layout.needed(0, 0) == []
    hashes = [bytes([i]) for i in range(9)]
    assert [run.key(hashes) for run in layout.needed(8, 9)] == [b"G\x08", b"S\x07", b"S\x08"]


def test_part_of_a_run_is_enough() -> None:
    layout = ValueLayout({GLOBAL: 1, SLIDING: 1}, window_blocks=2, run_blocks=4)
    window = [BlockRun(SLIDING, 4, 5), BlockRun(SLIDING, 5, 6)]
    run = BlockRun(GLOBAL, 4, 8)
    assert layout.choose({run, *window}, 4, 9) == (6, [run, *window])
    assert layout.choose({run, *window}, 6, 9) == (6, [])
    assert layout.choose({*window}, 4, 9) == (4, [])
    assert layout.choose({run, window[0]}, 4, 9) == (4, [])


@pytest.mark.parametrize("kinds", [(GLOBAL, SLIDING), (GLOBAL,), (SLIDING,)])
def test_the_choice_is_the_longest_prefix_that_is_there(kinds: tuple[AttentionKind, ...]) -> None:
    rng = random.Random(3)
    num_hits = 0
    for _ in range(500):
        layout = ValueLayout.of(dict.fromkeys(kinds, RUN_BYTES // rng.randint(1, 5)), 0)
        if SLIDING in kinds:
            least = int(GLOBAL not in kinds)
            window_blocks = rng.randint(least, 4)
            layout = ValueLayout(layout.block_bytes, window_blocks, layout.run_blocks)
        start = rng.randint(0, 8)
        stop = rng.randint(start + 1, 20)
        stored = {run for run in layout.all_runs(stop) if rng.random() < rng.choice([0.5, 0.9])}
        ends = [e for e in range(start, stop + 1) if can_resume(layout, stored, start, e)]
        for found in (stored, ask(layout, stored, start, stop)):
            end, runs = layout.choose(found, start, stop)
            assert end == max(ends)
            assert set(runs) <= found and (end > start) == bool(runs)
        num_hits += bool(runs)
    assert num_hits > 50


def ask(layout: ValueLayout, stored: set[BlockRun], start: int, stop: int) -> set[BlockRun]:
    """What of it the questions find."""
    found: set[BlockRun] = set()
    for runs in layout.questions(found, start, stop):
        found |= stored.intersection(runs)
    return found


def test_a_long_context_takes_few_questions() -> None:
    layout = ValueLayout({GLOBAL: 1, SLIDING: 1}, window_blocks=8, run_blocks=64)
    prompt = set(layout.needed(0, 2046))
    assert count_questions(layout, prompt) == [31 + 8 + 62 + 62], "all of it is there"
    assert sum(count_questions(layout, set())) < 400, "nothing is"
    part = set(layout.needed(0, 1024)) | prompt
    assert len(count_questions(layout, part, 2000)) == 2, "it ended at a checkpoint before"


def count_questions(
    layout: ValueLayout, stored: set[BlockRun], last_equal: int = 2046
) -> list[int]:
    """How many runs are asked for together, by a prompt that leaves what is stored after some."""
    found: set[BlockRun] = set()
    numbers = []
    for runs in layout.questions(found, 0, 2046):
        found |= {run for run in stored.intersection(runs) if run.stop <= last_equal}
        numbers.append(len(runs))
    return numbers


def can_resume(layout: ValueLayout, found: set[BlockRun], start: int, end: int) -> bool:
    """The definition: every block that is read is in a value that is there, and values end where
    runs or the prefix do.
    """
    if end == start:
        return True
    is_whole = {run for run in found if run.kind is SLIDING or run.stop % layout.run_blocks == 0}
    used = is_whole | {run for run in found if run.stop == end}
    blocks = {(run.kind, i) for run in used for i in range(run.start, run.stop)}
    global_ones = range(start if GLOBAL in layout.block_bytes else end, end)
    window = range(max(0, end - layout.window_blocks), end)
    return all((GLOBAL, i) in blocks for i in global_ones) and all(
        (SLIDING, i) in blocks for i in window
    )
