"""Which blocks make a stored value, under which key it stands, and where a request can resume.

A sliding block is a value of its own. Global blocks go in runs that begin at multiples of
`run_blocks`, so that a value has about `RUN_BYTES`; the last run of a prefix may be shorter. Each
value stands under the hash of its last block, which names everything before it too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cluster.spec import AttentionKind

GLOBAL, SLIDING = AttentionKind.GLOBAL, AttentionKind.SLIDING

RUN_BYTES = 2 << 20  # with smaller values each byte costs more Python, larger ones are late
MAX_RUN_BLOCKS = 64


class BlockRun(NamedTuple):
    """Blocks [start, stop) of a prefix, of one kind: what is in one value."""

    kind: AttentionKind
    start: int
    stop: int

    @property
    def num_blocks(self) -> int:
        return self.stop - self.start

    def key(self, block_hashes: Sequence[bytes]) -> bytes:
        """The store's key, in a prefix with these hashes."""
        return self.kind.name[:1].encode() + block_hashes[self.stop - 1]


@dataclass(frozen=True, slots=True)
class ValueLayout:
    """How a model's blocks are cut into values."""

    block_bytes: Mapping[AttentionKind, int]  # of the kinds that own keys and values
    window_blocks: int  # sliding blocks that a request which resumes reads
    run_blocks: int  # global blocks of a whole run

    @staticmethod
    def of(block_bytes: Mapping[AttentionKind, int], window_blocks: int) -> ValueLayout:
        run_blocks = RUN_BYTES // block_bytes.get(GLOBAL, RUN_BYTES)
        return ValueLayout(
            block_bytes,
            window_blocks if SLIDING in block_bytes else 0,
            min(max(1, run_blocks), MAX_RUN_BLOCKS),
        )

    def num_bytes(self, run: BlockRun) -> int:
        return run.num_blocks * self.block_bytes[run.kind]

    def global_run(self, stop: int) -> BlockRun:
        """The run that ends before block `stop`."""
        return BlockRun(GLOBAL, (stop - 1) // self.run_blocks * self.run_blocks, stop)

    def global_runs(self, start: int, stop: int) -> list[BlockRun]:
        """Whole runs, and a last one that ends before block `stop`, with those from `start` on."""
        if GLOBAL not in self.block_bytes or start >= stop:
            return []
        first_end = (start // self.run_blocks + 1) * self.run_blocks
        return [self.global_run(end) for end in (*range(first_end, stop, self.run_blocks), stop)]

    def all_runs(self, stop: int) -> list[BlockRun]:
        """All that may have been stored of the blocks before `stop`."""
        return self._around(0, stop)

    def questions(
        self, found: Collection[BlockRun], start: int, stop: int
    ) -> Iterator[list[BlockRun]]:
        """What to look up for a request which has the blocks before `start` and could use those
        before `stop`: one list after the other, while `found` grows by those that are there. Most
        requests find what they need, or nothing, in the first ones, which are short.
        """
        whole = [run for run in self.global_runs(start, stop) if run.stop % self.run_blocks == 0]
        last = max(start, stop // self.run_blocks * self.run_blocks)
        yield whole + self._around(last, stop)
        covered = max(start, self._covered(found, start, stop))
        if covered < last:  # it left there what was stored
            yield self._around(covered, min(stop, covered + self.run_blocks))
        if covered > start and self.choose(found, start, stop)[0] == start:
            yield [run for run in self._around(start, covered) if run.kind is SLIDING]

    def needed(self, start: int, stop: int) -> list[BlockRun]:
        """What a request reads that resumes after `stop` blocks and has those before `start`."""
        return self.global_runs(start, stop) + self._window(stop)

    def choose(
        self, found: Collection[BlockRun], start: int, stop: int
    ) -> tuple[int, list[BlockRun]]:
        """After how many blocks a request can resume with the runs found, at most `stop`, and those
        that it reads; `start` and none where they don't help.
        """
        covered = self._covered(found, start, stop)
        ends = self._window_ends(found) if self.window_blocks else range(stop + 1)
        for end in range(min(stop, covered + self.run_blocks), start, -1):
            if end in ends and end <= covered:
                whole = -(-end // self.run_blocks) * self.run_blocks
                return end, self.global_runs(start, whole) + self._window(end)
            if end in ends and self.global_run(end) in found:
                return end, self.needed(start, end)
        return start, []

    def _covered(self, found: Collection[BlockRun], start: int, stop: int) -> int:
        """Up to which block whole runs hold the global blocks from `start` on."""
        if GLOBAL not in self.block_bytes:
            return stop
        end = start // self.run_blocks * self.run_blocks
        while self.global_run(end + self.run_blocks) in found:
            end += self.run_blocks
        return end

    def _around(self, first: int, stop: int) -> list[BlockRun]:
        """What a request may need beside whole runs that resumes after `first` blocks, or after
        more, up to `stop`.
        """
        runs = []
        if self.window_blocks > 0:
            runs = [_sliding(i) for i in range(max(0, first - self.window_blocks), stop)]
        if GLOBAL in self.block_bytes:
            runs += [self.global_run(end) for end in range(first + 1, stop + 1)]
        return runs

    def _window_ends(self, found: Collection[BlockRun]) -> Collection[int]:
        """The blocks before which a whole window ends."""
        ends, in_a_row, before = set(), 0, -1
        for i in sorted(run.start for run in found if run.kind is SLIDING):
            in_a_row = in_a_row + 1 if i == before + 1 else 1
            before = i
            if in_a_row >= min(self.window_blocks, i + 1):
                ends.add(i + 1)
        return ends

    def _window(self, stop: int) -> list[BlockRun]:
        return [_sliding(i) for i in range(max(0, stop - self.window_blocks), stop)]


def _sliding(index: int) -> BlockRun:
    return BlockRun(SLIDING, index, index + 1)
