"""The last resort: groups of experts that lost every host, computed by the decoder itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait

import psutil
import torch
from torch import Tensor

from cluster.checkpoint import Checkpoint
from cluster.errors import Unavailable
from cluster.kernels.interface import ExpertSlots
from cluster.placement import ExpertGroups
from cluster.spec import ModelSpec
from experts.weights import OwnedExperts, load_experts

HEADROOM = 1.25  # of free memory for each byte of weights: for reading and converting a layer
LONGEST_LOAD_S = 600.0  # of one group; past it, the disk hangs

log = logging.getLogger(__name__)


class Fallback:
    """Computes single groups on the CPU, from the checkpoint.

    A group is read when it is first needed, in a thread of its own, so that its caller can report
    the wait. As a group is the unit of summation, its bits are those of a host with the same device
    and dtype. Not locked: one thread uses it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        groups: ExpertGroups,
        *,
        dtype: torch.dtype,
        batch_invariant: bool = False,
    ) -> None:
        self._spec, self._checkpoint, self._groups = spec, checkpoint, groups
        self._dtype, self._batch_invariant = dtype, batch_invariant
        self._loads: dict[int, Future[OwnedExperts]] = {}  # by group; under way, or done
        self._reader = ThreadPoolExecutor(1, "expert-fallback")
        self._reading_since = 0.0  # the group that is being read

    def can_hold(self, group_ids: Collection[int]) -> bool:
        """Return whether these groups are in memory, being read, or fit in what is free now."""
        missing = sum(self._num_bytes(group) for group in group_ids if group not in self._loads)
        return not missing or missing * HEADROOM <= psutil.virtual_memory().available

    @property
    def held(self) -> list[int]:
        """The groups whose weights are in memory or being read."""
        return sorted(self._loads)

    @property
    def loading(self) -> list[int]:
        """The groups whose weights are being read."""
        return sorted(group_id for group_id, load in self._loads.items() if not load.done())

    def load(self, group_ids: Collection[int], timeout_s: float) -> bool:
        """Start reading these groups unless that has begun, and wait for them.

        Args:
            group_ids: the groups.
            timeout_s: how long to wait.

        Returns:
            True if all are loaded; if not, call again.

        Raises:
            CheckpointError: a group can't be read; the next call tries again.
            Unavailable: reading takes more than LONGEST_LOAD_S.
        """
        for group_id in group_ids:
            if group_id not in self._loads:
                self._loads[group_id] = self._reader.submit(self._read, group_id)
        if wait([self._loads[group_id] for group_id in group_ids], timeout_s).not_done:
            if time.monotonic() - self._reading_since > LONGEST_LOAD_S:
                raise Unavailable(f"Reading the experts of groups {self.loading} takes too long.")
            return False
        failed = [self._loads.pop(g) for g in group_ids if self._loads[g].exception()]
        for load in failed:
            load.result()  # raises
        return True

    def partials(
        self, group_id: int, layer_idx: int, hidden_states: Tensor, slots: ExpertSlots
    ) -> Tensor:
        """Compute the weighted sum of a group that is loaded.

        Args:
            group_id: of the experts.
            layer_idx: of the experts.
            hidden_states: [num_tokens, hidden], on the CPU.
            slots: of this group's experts only, by logical ids.

        Returns:
            [num_tokens, hidden].
        """
        owned = self._loads[group_id].result()
        with torch.inference_mode():
            return owned.partials(layer_idx, hidden_states, slots)[0]

    def free(self) -> None:
        """Free the weights, as hosts hold every group again; not while a group is being read."""
        if self._loads and not self.loading:
            log.warning("Every group of experts has a host again.")
            self._loads.clear()

    def _read(self, group_id: int) -> OwnedExperts:
        self._reading_since = time.monotonic()
        log.warning(
            "No expert host is alive for group %d: the decoder computes it from now on, slower, "
            "and reads its %.2f GB of weights.",
            group_id,
            self._num_bytes(group_id) / 1e9,
        )
        return load_experts(
            self._spec,
            self._checkpoint,
            self._groups,
            [group_id],
            dtype=self._dtype,
            batch_invariant=self._batch_invariant,
        )

    def _num_bytes(self, group_id: int) -> int:
        spec = self._spec
        weights = 3 * spec.hidden_size * spec.moe_intermediate_size  # gate, up and down
        num_experts = len(self._groups.experts_of(group_id)) * spec.num_layers
        return num_experts * weights * self._dtype.itemsize
