"""What is trained when: longer prompts and values as the time goes by."""

from __future__ import annotations

from dataclasses import dataclass


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
