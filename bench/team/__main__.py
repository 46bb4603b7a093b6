"""What sharing the cluster costs and brings, in one run: `python -m bench.team`, which is `make
bench-team`. Each part is a bench of its own (`python -m bench.team.PART`); this one runs them in
turn and gathers their results and checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.lib.in_turn import Part, gather

# The limits are for a part that hangs: on a quiet machine all together take some 15 minutes.
PARTS = {
    "fair_share": Part(360, ("--seconds", "11")),
    "gateway_cost": Part(360, ("--seconds", "1")),
    "metrics_cost": Part(240),
    "soak": Part(480, ("--warm-up", "3", "--seconds", "6", "--streams", "8")),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the parts, print their cards and all checks, return the JSON object."""
    return gather("team", PARTS, __doc__, argv)


if __name__ == "__main__":
    main()
