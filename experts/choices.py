"""A layer's choices of experts: what each host is asked of them, and how the answers add up.

This stands on the path of every layer. `choices.cpp` does it where there is a C++ compiler; the
same in PyTorch follows below.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cluster.kernels.build import declare, native_library
from cluster.kernels.interface import ExpertSlots
from cluster.placement import ExpertGroups
from experts.summation import sum_partials

SOURCE = Path(__file__).with_suffix(".cpp")
POINTER, SIZE, FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
SIGNATURES = {
    "select_slots": [POINTER, POINTER, SIZE, SIZE, *[POINTER] * 5],
    "count_rows": [POINTER, SIZE, SIZE, POINTER, SIZE, POINTER],
    "sum_groups": [POINTER, SIZE, SIZE, POINTER, SIZE, POINTER, SIZE, FLAG, POINTER, FLAG],
}
NATIVE_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class AskedSlots:
    """The slots of a layer that somebody is asked for, in token order.

    `table` [3, num_slots] int32 holds rows, experts and the bits of the fp32 weights: as a frame
    carries them. A row is a position in `tokens`, or the token itself where every token has a slot
    and `tokens` is None.
    """

    table: Tensor
    tokens: Tensor | None  # [num_rows] int64

    def rows_of(self, hidden_states: Tensor) -> Tensor:
        """The rows that the slots speak of, of [num_tokens, hidden]."""
        return hidden_states if self.tokens is None else hidden_states[self.tokens]

    def unpack(self) -> ExpertSlots:
        """The same, a tensor for each of the three."""
        return ExpertSlots.from_table(self.table)


class GroupCut:
    """The fixed cut of the experts into groups, and the code for it that this machine has."""

    def __init__(self, groups: ExpertGroups) -> None:
        self.num_groups, self.num_experts = groups.num_groups, groups.num_experts
        self.expert_to_group = torch.tensor([groups.group_of(e) for e in range(self.num_experts)])
        self.native = native_library(SOURCE)
        if self.native is not None:
            declare(self.native, SIGNATURES)

    def mask(self, group_ids: Collection[int]) -> Tensor:
        """The experts of some groups: [num_experts] bool."""
        return torch.isin(self.expert_to_group, torch.tensor(list(group_ids)))


class Choices:
    """Which tokens of a layer go to which experts, and with which weights; kept on the CPU."""

    def __init__(self, cut: GroupCut, topk_ids: Tensor, topk_weights: Tensor) -> None:
        """Shapes: topk_ids int64 and topk_weights [num_tokens, k]."""
        assert topk_ids.dtype is torch.int64
        self.experts = topk_ids.cpu().contiguous()
        self.weights = topk_weights.float().cpu().contiguous()
        self.num_tokens = len(self.experts)
        self._cut = cut

    def slots_of(self, is_asked: Tensor) -> AskedSlots | None:
        """The slots of some experts; None if there are none. Shape: is_asked [num_experts] bool."""
        native = self._cut.native
        if native is None:
            return self._slots_in_torch(is_asked)
        table = torch.empty(3 * self.experts.numel(), dtype=torch.int32)
        tokens = torch.empty(self.num_tokens, dtype=torch.int64)
        num_slots, num_rows = ctypes.c_int64(), ctypes.c_int64()
        native.select_slots(
            self.experts.data_ptr(),
            self.weights.data_ptr(),
            *self.experts.shape,
            is_asked.data_ptr(),
            table.data_ptr(),
            tokens.data_ptr(),
            ctypes.byref(num_slots),
            ctypes.byref(num_rows),
        )
        if not num_slots.value:
            return None
        table = table[: 3 * num_slots.value].view(3, -1)
        all_asked = num_rows.value == self.num_tokens
        return AskedSlots(table, None if all_asked else tokens[: num_rows.value])

    def count_rows(self) -> list[int]:
        """How many tokens have a slot in each group."""
        native = self._cut.native
        if native is None:
            return self._has_slot().sum(1).tolist()
        counts = (ctypes.c_int64 * self._cut.num_groups)()
        native.count_rows(
            self.experts.data_ptr(),
            *self.experts.shape,
            self._cut.expert_to_group.data_ptr(),
            self._cut.num_groups,
            counts,
        )
        return list(counts)

    def add_up(self, group_rows: Sequence[Tensor]) -> Tensor:
        """The groups' rows added in fp32 in the groups' order: [num_tokens, hidden], in the dtype
        of the rows. Shape: of each group [num_rows, hidden], as `count_rows` says, contiguous.
        """
        assert len(group_rows) == self._cut.num_groups
        first = group_rows[0]
        native = self._cut.native if first.dtype in NATIVE_DTYPES else None
        if native is None:
            return self._add_up_in_torch(group_rows)
        total = first.new_empty(self.num_tokens, first.shape[1])
        native.sum_groups(
            self.experts.data_ptr(),
            *self.experts.shape,
            self._cut.expert_to_group.data_ptr(),
            self._cut.num_groups,
            (ctypes.c_void_p * self._cut.num_groups)(*(rows.data_ptr() for rows in group_rows)),
            first.shape[1],
            first.dtype is torch.bfloat16,
            total.data_ptr(),
            torch.get_num_threads(),
        )
        return total

    def _slots_in_torch(self, is_asked: Tensor) -> AskedSlots | None:
        chosen = is_asked[self.experts]  # [num_tokens, k]
        tokens = chosen.any(1).nonzero().flatten()
        if not len(tokens):
            return None
        chosen = chosen[tokens]
        rows = torch.arange(len(tokens))[:, None].expand_as(chosen)[chosen]
        experts, weights = self.experts[tokens][chosen], self.weights[tokens][chosen]
        table = torch.stack((rows.int(), experts.int(), weights.view(torch.int32)))
        return AskedSlots(table, None if len(tokens) == self.num_tokens else tokens)

    def _add_up_in_torch(self, group_rows: Sequence[Tensor]) -> Tensor:
        shape = self._cut.num_groups, self.num_tokens, group_rows[0].shape[1]
        partials = group_rows[0].new_zeros(shape)
        for partial, has_slot, rows in zip(partials, self._has_slot(), group_rows, strict=True):
            partial[has_slot] = rows
        return sum_partials(partials)

    def _has_slot(self) -> Tensor:
        """[num_groups, num_tokens] bool."""
        groups = torch.arange(self._cut.num_groups)[:, None, None]
        return (self._cut.expert_to_group[self.experts] == groups).any(2)
