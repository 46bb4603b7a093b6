"""The routed tokens of a layer: what each host is asked for, and the sum of the answers.

This stands on the path of every layer. `routed_tokens.cpp` does it where there is a C++ compiler;
the same in PyTorch follows below.
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
class SelectedSlots:
    """The slots of a layer that belong to some of its experts, in token order."""

    # [3, num_slots] int32, as a frame carries it: positions in `tokens`, logical expert ids, and
    # the bits of the fp32 weights.
    table: Tensor
    tokens: Tensor | None  # [num_selected] int64; None where every token has a slot

    def rows_of(self, hidden_states: Tensor) -> Tensor:
        """Select the tokens that have a slot: [num_tokens, hidden] -> [num_selected, hidden]."""
        return hidden_states if self.tokens is None else hidden_states[self.tokens]

    def unpack(self) -> ExpertSlots:
        """Return the table as three tensors."""
        return ExpertSlots.from_table(self.table)


class ExpertGroupTable:
    """The fixed cut of the experts into groups as tensors, and the native code for it."""

    def __init__(self, groups: ExpertGroups, *, use_native: bool = True) -> None:
        self.num_groups, self.num_experts = groups.num_groups, groups.num_experts
        self.expert_to_group = torch.tensor([groups.group_of(e) for e in range(self.num_experts)])
        self.native = native_library(SOURCE) if use_native else None
        if self.native is not None:
            declare(self.native, SIGNATURES)

    def experts_of(self, group_ids: Collection[int]) -> Tensor:
        """Return the experts of some groups as a mask, [num_experts] bool."""
        return torch.isin(self.expert_to_group, torch.tensor(list(group_ids)))


class RoutedTokens:
    """Which tokens of a layer go to which experts, and with which weights; kept on the CPU."""

    def __init__(self, table: ExpertGroupTable, topk_ids: Tensor, topk_weights: Tensor) -> None:
        """Copy the router's choices to the CPU.

        Args:
            table: the cut into groups.
            topk_ids: [num_tokens, k] int64, logical expert ids.
            topk_weights: [num_tokens, k].
        """
        assert topk_ids.dtype is torch.int64
        self.topk_ids = topk_ids.cpu().contiguous()
        self.topk_weights = topk_weights.float().cpu().contiguous()
        self.num_tokens, self.top_k = self.topk_ids.shape
        self._table = table

    def select(self, is_asked: Tensor) -> SelectedSlots | None:
        """Select the slots of some experts; None if there are none.

        Args:
            is_asked: [num_experts] bool.
        """
        native = self._table.native
        if native is None:
            return self._select_in_torch(is_asked)
        assert is_asked.dtype is torch.bool and len(is_asked) == self._table.num_experts
        slots = torch.empty(3 * self.topk_ids.numel(), dtype=torch.int32)
        tokens = torch.empty(self.num_tokens, dtype=torch.int64)
        num_slots, num_selected = ctypes.c_int64(), ctypes.c_int64()
        native.select_slots(
            self.topk_ids.data_ptr(),
            self.topk_weights.data_ptr(),
            self.num_tokens,
            self.top_k,
            is_asked.data_ptr(),
            slots.data_ptr(),
            tokens.data_ptr(),
            ctypes.byref(num_slots),
            ctypes.byref(num_selected),
        )
        if not num_slots.value:
            return None
        all_selected = num_selected.value == self.num_tokens
        return SelectedSlots(
            slots[: 3 * num_slots.value].view(3, -1),
            None if all_selected else tokens[: num_selected.value],
        )

    def count_rows(self) -> list[int]:
        """Count the tokens that have a slot in each group."""
        native = self._table.native
        if native is None:
            return self._has_slot().sum(1).tolist()
        counts = (ctypes.c_int64 * self._table.num_groups)()
        native.count_rows(
            self.topk_ids.data_ptr(),
            self.num_tokens,
            self.top_k,
            self._table.expert_to_group.data_ptr(),
            self._table.num_groups,
            counts,
        )
        return list(counts)

    def sum_groups(self, group_rows: Sequence[Tensor]) -> Tensor:
        """Add each token's rows in fp32 in the groups' order.

        Args:
            group_rows: for each group, contiguous [num_rows, hidden]: the rows of the tokens that
                have a slot in it, in order, as many as `count_rows` says.

        Returns:
            [num_tokens, hidden] in the dtype of the rows.
        """
        assert len(group_rows) == self._table.num_groups
        first = group_rows[0]
        native = self._table.native if first.dtype in NATIVE_DTYPES else None
        if native is None:
            return self._sum_in_torch(group_rows)
        assert all(rows.is_contiguous() and rows.dtype is first.dtype for rows in group_rows)
        total = first.new_empty(self.num_tokens, first.shape[1])
        native.sum_groups(
            self.topk_ids.data_ptr(),
            self.num_tokens,
            self.top_k,
            self._table.expert_to_group.data_ptr(),
            self._table.num_groups,
            (POINTER * self._table.num_groups)(*(rows.data_ptr() for rows in group_rows)),
            first.shape[1],
            first.dtype is torch.bfloat16,
            total.data_ptr(),
            torch.get_num_threads(),
        )
        return total

    def _select_in_torch(self, is_asked: Tensor) -> SelectedSlots | None:
        chosen = is_asked[self.topk_ids]  # [num_tokens, k]
        tokens = chosen.any(1).nonzero().flatten()
        if not len(tokens):
            return None
        chosen = chosen[tokens]
        positions = torch.arange(len(tokens))[:, None].expand_as(chosen)[chosen]
        experts, weights = self.topk_ids[tokens][chosen], self.topk_weights[tokens][chosen]
        table = torch.stack((positions.int(), experts.int(), weights.view(torch.int32)))
        return SelectedSlots(table, None if len(tokens) == self.num_tokens else tokens)

    def _sum_in_torch(self, group_rows: Sequence[Tensor]) -> Tensor:
        shape = self._table.num_groups, self.num_tokens, group_rows[0].shape[1]
        partials = group_rows[0].new_zeros(shape)
        for partial, has_slot, rows in zip(partials, self._has_slot(), group_rows, strict=True):
            partial[has_slot] = rows
        return sum_partials(partials)

    def _has_slot(self) -> Tensor:
        """Return which tokens have a slot in each group: [num_groups, num_tokens] bool."""
        groups = torch.arange(self._table.num_groups)[:, None, None]
        return (self._table.expert_to_group[self.topk_ids] == groups).any(2)
