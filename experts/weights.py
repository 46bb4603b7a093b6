"""Reading the slices of the experts that a process owns, and no others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.checkpoint import Checkpoint
from cluster.errors import NotEnoughMemory
from cluster.kernels.check import check_invariance
from cluster.kernels.choose import kernels_for
from cluster.kernels.interface import ExpertSlots, Kernels, LayerExperts
from cluster.placement import ExpertGroups
from cluster.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class OwnedExperts:
    """The experts of some groups, in every layer, and the kernels that compute them."""

    kernels: Kernels
    group_ids: tuple[int, ...]  # ascending
    layers: tuple[LayerExperts, ...]
    expert_to_row: Tensor  # [num_experts] int64: the row in each layer's tensors, -1 if not owned

    def partials(self, layer_idx: int, hidden_states: Tensor, slots: ExpertSlots) -> Tensor:
        """Return each owned group's weighted sum of experts, for slots of owned experts only.

        Args:
            layer_idx: of the experts.
            hidden_states: [num_tokens, hidden].
            slots: by logical expert ids.

        Returns:
            [num_groups, num_tokens, hidden], see `Kernels.expert_partials`.
        """
        local = ExpertSlots(slots.tokens, self.expert_to_row[slots.experts], slots.weights)
        return self.kernels.expert_partials(hidden_states, local, self.layers[layer_idx])

    def rows(self, layer_idx: int, hidden_states: Tensor, slot_table: Tensor) -> Tensor | None:
        """Return the rows of `partials` that have a slot, or None if an expert isn't owned.

        Args:
            layer_idx: of the experts.
            hidden_states: [num_tokens, hidden].
            slot_table: [3, num_slots] int32 by logical expert ids, as a frame carries it.

        Returns:
            [num_rows, hidden], see `Kernels.expert_rows`.
        """
        return self.kernels.expert_rows(
            hidden_states, slot_table, self.expert_to_row, self.layers[layer_idx]
        )

    @property
    def num_bytes(self) -> int:
        """Memory of the weights."""
        return sum(layer.nbytes for layer in self.layers)


def load_experts(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    groups: ExpertGroups,
    group_ids: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    batch_invariant: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> OwnedExperts:
    """Read the experts of some groups in every layer, and no others.

    Args:
        spec: of the model.
        checkpoint: to read from.
        groups: the cut of the experts into groups.
        group_ids: the groups to own.
        dtype: of the weights.
        device: that holds them.
        batch_invariant: whether a row's bits mustn't depend on the batch.
        on_progress: called with (layers read, layers in all).

    Raises:
        CheckpointError: a tensor, which it names, is missing or has a wrong shape.
        NotEnoughMemory: the weights don't fit on the device.
        ConfigError: this machine can't keep `batch_invariant`.
    """
    assert groups.num_experts == spec.num_experts and group_ids
    owned_groups = tuple(sorted(group_ids))
    runs = _merge_runs([groups.experts_of(group_id) for group_id in owned_groups])
    owned = [expert for run in runs for expert in run]
    expert_to_row = torch.full((spec.num_experts,), -1, dtype=torch.int64)
    expert_to_row[owned] = torch.arange(len(owned))
    positions = [owned_groups.index(groups.group_of(expert)) for expert in owned]
    expert_to_group = torch.tensor(positions, device=device)
    kernels = kernels_for(device, dtype, batch_invariant=batch_invariant)
    layers: list[LayerExperts] = []
    for layer in spec.layers:
        try:
            gate_up, down = (
                weight.to(device=device, dtype=dtype)
                for weight in _read_layer(spec, checkpoint, layer.layer_idx, runs)
            )
        except torch.OutOfMemoryError as error:
            raise NotEnoughMemory(f"The experts don't fit on {device}: {error}") from None
        if batch_invariant and not layers:
            check_invariance(kernels, [gate_up[0], down[0]])
        layers.append(
            LayerExperts(
                kernels.pack_gated(gate_up),
                kernels.pack(down),
                expert_to_group,
                len(owned_groups),
            )
        )
        if on_progress is not None:
            on_progress(len(layers), spec.num_layers)
    return OwnedExperts(kernels, owned_groups, tuple(layers), expert_to_row.to(device))


def _read_layer(
    spec: ModelSpec, checkpoint: Checkpoint, layer_idx: int, runs: Sequence[range]
) -> Iterator[Tensor]:
    """Read the experts in `runs`: gate_up, then down, in the checkpoint's dtype."""
    prefix = f"{spec.tensor_prefix}layers.{layer_idx}.experts."
    hidden, inner = spec.hidden_size, spec.moe_intermediate_size
    shapes = {
        "gate_up_proj": (spec.num_experts, 2 * inner, hidden),
        "down_proj": (spec.num_experts, hidden, inner),
    }
    for name, shape in shapes.items():
        parts = [checkpoint.read_rows(prefix + name, run, shape) for run in runs]
        yield parts[0] if len(parts) == 1 else torch.cat(parts)


def _merge_runs(ranges: Sequence[range]) -> list[range]:
    """Join neighbouring ranges, so that one read takes all of them."""
    runs: list[range] = []
    for part in ranges:
        if runs and runs[-1].stop == part.start:
            runs[-1] = range(runs[-1].start, part.stop)
        else:
            runs.append(part)
    return runs
