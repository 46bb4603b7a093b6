"""The last resort: groups of experts that lost every host, computed by the decoder itself."""

from __future__ import annotations

import logging
from collections.abc import Collection

import psutil
import torch
from torch import Tensor

from cluster.checkpoint import Checkpoint
from cluster.placement import ExpertGroups
from cluster.spec import ModelSpec
from experts.kernels import Slots, group_partials
from experts.weights import OwnedExperts, load_experts

HEADROOM = 1.25  # of free memory for each byte of weights: for reading and converting a layer

log = logging.getLogger(__name__)


class Fallback:
    """Computes single groups on the CPU, from the checkpoint; reads each when it is first needed.

    As a group is the unit of summation, its bits are those of a host with the same device and
    dtype. Not locked: one thread uses it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        groups: ExpertGroups,
        dtype: torch.dtype,
        batch_invariant: bool = False,
    ) -> None:
        self._spec, self._checkpoint, self._groups = spec, checkpoint, groups
        self._dtype, self._batch_invariant = dtype, batch_invariant
        self._loaded: dict[int, OwnedExperts] = {}

    def can_hold(self, group_ids: Collection[int]) -> bool:
        """Whether these groups are in memory, or would fit in what is free of it now."""
        missing = sum(self._num_bytes(group) for group in group_ids if group not in self._loaded)
        return not missing or missing * HEADROOM <= psutil.virtual_memory().available

    def partials(
        self, group_id: int, layer_idx: int, hidden_states: Tensor, slots: Slots
    ) -> Tensor:
        """The group's weighted sum: [num_tokens, hidden].

        Shapes: hidden_states [num_tokens, hidden], on the CPU; slots of this group's experts only.
        Raises CheckpointError when the group can't be read.
        """
        owned = self._loaded.get(group_id) or self._load(group_id)
        layer = owned.layers[layer_idx]
        slots = owned.localise(slots)
        with torch.inference_mode():
            partials = group_partials(hidden_states, slots, layer)
        return partials[0]

    def free(self) -> None:
        """Give the memory back: hosts hold every group again."""
        if self._loaded:
            log.warning("Every group of experts has a host again.")
            self._loaded.clear()

    def _load(self, group_id: int) -> OwnedExperts:
        log.warning(
            "No expert host is alive for group %d: the decoder computes it from now on, slower, "
            "and reads its %.2f GB of weights.",
            group_id,
            self._num_bytes(group_id) / 1e9,
        )
        self._loaded[group_id] = load_experts(
            self._spec,
            self._checkpoint,
            self._groups,
            [group_id],
            self._dtype,
            batch_invariant=self._batch_invariant,
        )
        return self._loaded[group_id]

    def _num_bytes(self, group_id: int) -> int:
        spec = self._spec
        weights = 3 * spec.hidden_size * spec.moe_intermediate_size  # gate, up and down
        num_experts = len(self._groups.experts_of(group_id)) * spec.num_layers
        return num_experts * weights * self._dtype.itemsize
