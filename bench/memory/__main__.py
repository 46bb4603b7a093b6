"""What remembering contexts costs and brings, in one run: `python -m bench.memory`, which is `make
bench-memory`. Each part is a bench of its own (`python -m bench.memory.PART`); this one runs them
in turn and gathers their results and checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.lib.in_turn import Part, gather

# The limits are for a part that hangs: on a quiet machine all together take some 12 minutes.
PARTS = {
    "kv_layout": Part(60),
    "kv_store": Part(90, ("--values", "4", "--rounds", "1")),
    "write_behind": Part(150, ("--rounds", "1", "--tokens", "32")),
    "restore": Part(300, ("--lengths", "2048", "--prompts", "1")),
    "fetch_choice": Part(180, ("--lengths", "128", "256", "--rounds", "1")),
    "conversation": Part(90, ("--turns", "3")),
    "redis_cases": Part(420, ("--cases", "5")),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the parts, print their cards and all checks, return the JSON object."""
    return gather("memory", PARTS, __doc__, argv)


if __name__ == "__main__":
    main()
