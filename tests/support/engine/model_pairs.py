"""A tiny model twice: transformers' and ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.checkpoint import Checkpoint
from cluster.placement import ExpertGroups
from cluster.spec import ModelSpec
from engine.model.model import GemmaDecoder
from experts.local import LocalExperts
from tests.support.engine.paged_driver import PagedDriver
from tests.support.engine.tiny_models import nest, tiny_model


@dataclass
class Pair:
    """A model twice: transformers' and ours."""

    reference: Any
    model: GemmaDecoder
    experts: LocalExperts | None
    path: Path

    def driver(self, **options: Any) -> PagedDriver:
        return PagedDriver(self.model, self.experts, **options)


MakePair = Callable[..., Pair]


@pytest.fixture
def make_pair(tmp_path: Path) -> MakePair:
    def make(member: str, nested_type: str | None = None, **overrides: Any) -> Pair:
        reference = tiny_model(member, **overrides)
        reference.save_pretrained(tmp_path, max_shard_size="60KB")
        if nested_type is not None:
            nest(tmp_path, nested_type)
        spec, checkpoint = ModelSpec.load(tmp_path), Checkpoint(tmp_path)
        experts = None
        if spec.is_moe:
            experts = LocalExperts(
                spec, checkpoint, ExpertGroups(spec.num_experts, 2), dtype=torch.float32
            )
        return Pair(reference, GemmaDecoder.load(spec, checkpoint), experts, tmp_path)

    return make


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(2, 160, (length,), generator=generator).tolist()
