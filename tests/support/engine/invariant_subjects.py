"""Models in batch_invariant mode, with the logits of runs alone to compare other runs with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.checkpoint import Checkpoint
from cluster.placement import ExpertGroups
from cluster.spec import KVLayout, ModelSpec
from engine.model.model import GemmaDecoder
from experts.local import LocalExperts
from tests.support.engine.paged_driver import PagedDriver, Sequence

NUM_TOKENS = 4  # generated after each prompt
NUM_GROUPS = 3


@dataclass
class Subject:
    """A model and, for each prompt so far, the logits of a run alone and unchunked."""

    path: Path
    model: GemmaDecoder
    experts: LocalExperts | None
    alone: dict[tuple[int, int, KVLayout], Sequence]

    def run_alone(self, length: int, seed: int, kv_layout: KVLayout = "values") -> Sequence:
        key = (length, seed, kv_layout)
        if key not in self.alone:
            sequence = Sequence(prompt(self.model.spec.vocab_size, length, seed))
            driver = PagedDriver(self.model, self.experts, kv_layout=kv_layout)
            driver.step([(sequence, length)])
            driver.generate(sequence, NUM_TOKENS)
            self.alone[key] = sequence
        return self.alone[key]


def load(path: Path) -> Subject:
    spec, checkpoint = ModelSpec.load(path), Checkpoint(path)
    model = GemmaDecoder.load(spec, checkpoint, batch_invariant=True)
    experts = None
    if spec.is_moe:
        groups = ExpertGroups(spec.num_experts, NUM_GROUPS)
        experts = LocalExperts(spec, checkpoint, groups, dtype=torch.float32, batch_invariant=True)
    return Subject(path, model, experts, {})


def prompt(vocab_size: int, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(2, vocab_size, (length,), generator=generator).tolist()
