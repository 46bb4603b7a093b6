"""A system under test in a process of its own, so that its threads can't slow another's.

Two OpenMP runtimes in one process count each other's threads and stop spinning: after llama.cpp had
run there, the in-process engine was half as fast, until llama.cpp was closed.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection

from bench.lib.peers import NotMeasured
from bench.lib.timing import System, Timing

CLOSE_S = 10.0


class Isolated:
    """Makes a system in a new process and passes its calls on. `make` must be picklable."""

    def __init__(self, name: str, make: Callable[[], System]) -> None:
        """Raises NotMeasured when the system can't be made."""
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Timing:
        self._pipe.send((prompts, num_tokens))
        timing = self._receive()
        assert isinstance(timing, Timing)
        return timing

    def close(self) -> None:
        self._pipe.close()
        self._process.join(CLOSE_S)
        self._process.kill()

    def _receive(self) -> object:
        try:
            answer: object = self._pipe.recv()
        except EOFError:
            raise NotMeasured(f"The process of {self.name} ended.") from None
        if isinstance(answer, NotMeasured):
            raise answer
        return answer


def _serve(pipe: Connection, make: Callable[[], System]) -> None:
    """The process: make the system, then answer calls until the other end is closed."""
    try:
        system = make()
        pipe.send("ready")
        while True:
            pipe.send(system.generate(*pipe.recv()))
    except NotMeasured as reason:
        pipe.send(reason)
    except EOFError:
        system.close()
