"""NativeKernels: the C++ kernels behind the interface of the kernels, for a CPU in fp32."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from cluster.kernels.build import declare, native_library
from cluster.kernels.interface import (
    ExpertSlots,
    KeyFormation,
    KVWrite,
    LayerExperts,
    PackedWeight,
    Weight,
)

SOURCE = Path(__file__).with_suffix("")  # a folder of C++
PANEL, LANES = 32, 16  # as in gemm.h and vec.h

POINTER, SIZE, REAL, COUNT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
SIGNATURES = {
    "linear": [POINTER, SIZE, SIZE, POINTER, SIZE, POINTER, POINTER, COUNT],
    "gated_mlp": [POINTER, SIZE, SIZE, POINTER, SIZE, POINTER, SIZE, POINTER, COUNT],
    "gated_gelu": [POINTER, POINTER, SIZE, POINTER],
    "rms_norm": [POINTER, SIZE, SIZE, POINTER, REAL, POINTER, POINTER, POINTER, COUNT],
    "norm_and_rotate": [POINTER, *[SIZE] * 5, POINTER, REAL, *[POINTER] * 6, COUNT],
    "attend": [
        *[POINTER, SIZE, SIZE, POINTER, POINTER, SIZE, SIZE, SIZE],
        *[POINTER, POINTER, POINTER, SIZE, POINTER],
        *[POINTER, SIZE, POINTER, POINTER, SIZE, POINTER, COUNT],
    ],
    "top_k_experts": [POINTER, SIZE, SIZE, SIZE, POINTER, POINTER, POINTER],
    "expert_partials": [
        *[POINTER, SIZE, SIZE, POINTER, POINTER, POINTER, SIZE, POINTER, POINTER],
        *[SIZE, SIZE, POINTER, SIZE, POINTER, COUNT],
    ],
    "expert_rows": [
        *[POINTER, SIZE, SIZE, POINTER, SIZE, POINTER, POINTER, POINTER],
        *[SIZE, SIZE, POINTER, SIZE, POINTER, COUNT],
    ],
}


def native_kernels() -> NativeKernels | None:
    """Return this machine's native kernels; None where they can't be built."""
    library = native_library(SOURCE)
    return NativeKernels(library) if library else None


class NativeKernels:
    """Implements Kernels on a CPU in fp32; a row's bits never depend on the batch."""

    name = "native"
    reads_free_slots = False

    def __init__(self, functions: ctypes.CDLL) -> None:
        declare(functions, SIGNATURES)
        functions.expert_rows.restype = SIZE
        self._functions = functions

    def pack(self, weight: Tensor) -> PackedWeight:
        return PackedWeight(_panels(weight, PANEL), weight.shape[-2])

    def pack_gated(self, weight: Tensor) -> PackedWeight:
        gate, up = (_panels(half, LANES) for half in weight.chunk(2, dim=-2))
        return PackedWeight(torch.cat((gate, up), dim=-1), weight.shape[-2] // 2)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        weight = _packed(weight)
        num_rows, num_inputs = x.shape
        y = x.new_empty(num_rows, weight.num_outputs)
        x = x.contiguous()
        self._functions.linear(
            _address(x, num_rows * num_inputs),
            num_rows,
            num_inputs,
            _panels_address(weight, num_inputs),
            weight.num_outputs,
            None if bias is None else _address(bias, weight.num_outputs),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y

    def gated_gelu(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up, y = gate.contiguous(), up.contiguous(), torch.empty_like(up)
        self._functions.gated_gelu(
            _address(gate, up.numel()), _address(up, up.numel()), up.numel(), y.data_ptr()
        )
        return y

    def gated_mlp(self, x: Tensor, gate_up: Weight, down: Weight) -> Tensor:
        gate_up, down = _packed(gate_up), _packed(down)
        num_rows, num_inputs = x.shape
        y = x.new_empty(num_rows, down.num_outputs)
        x = x.contiguous()
        self._functions.gated_mlp(
            _address(x, num_rows * num_inputs),
            num_rows,
            num_inputs,
            _panels_address(gate_up, num_inputs),
            gate_up.num_outputs,
            _panels_address(down, gate_up.num_outputs),
            down.num_outputs,
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return self._norm(x, weight, eps, residual=None, scale=None)

    def add_norm(
        self, residual: Tensor, x: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None
    ) -> Tensor:
        return self._norm(x, weight, eps, residual=residual.contiguous(), scale=scale)

    def _norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        eps: float,
        *,
        residual: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        size = x.shape[-1]
        self._functions.rms_norm(
            _address(x, x.numel()),
            x.numel() // size,
            size,
            None if weight is None else _address(weight, size),
            eps,
            None if residual is None else _address(residual, x.numel()),
            None if scale is None else _address(scale, 1),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y

    def norm_and_rotate(
        self,
        qkv: Tensor,
        num_queries: int,
        norm_weight: Tensor,
        eps: float,
        rotation: tuple[Tensor, Tensor],
        kv: KVWrite | None,
    ) -> Tensor:
        num_rows, num_heads, head_dim = qkv.shape
        num_kv_heads = 0 if kv is None else kv.values.shape[1]
        num_keys = 0 if kv is None or kv.keys is None else num_kv_heads
        assert len(norm_weight) >= num_queries + num_keys <= num_heads
        query = qkv.new_empty(num_rows, num_queries, head_dim)
        cos, sin = rotation
        slots = keys = values = None
        if kv is not None:
            slots = _address(kv.kv_slots, num_rows, dtype=torch.int64)
            values = _address(kv.values, len(kv.values) * num_kv_heads * head_dim)
            if kv.keys is not None:
                keys = _address(kv.keys, kv.values.numel())
        self._functions.norm_and_rotate(
            _address(qkv, num_rows * num_heads * head_dim),
            num_rows,
            num_heads,
            num_queries,
            num_kv_heads,
            head_dim,
            _address(norm_weight, len(norm_weight) * head_dim),
            eps,
            _address(cos, num_rows * head_dim),
            _address(sin, num_rows * head_dim),
            slots,
            query.data_ptr(),
            keys,
            values,
            torch.get_num_threads(),
        )
        return query

    def attend(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor,
        *,
        block_tables: Tensor,
        requests: Tensor,
        positions: Tensor,
        window: int | None,
        key_formation: KeyFormation | None = None,
    ) -> Tensor:
        num_rows, num_heads, head_dim = query.shape
        num_blocks, block_size, num_kv_heads, _ = value.shape
        assert (key is None) == (key_formation is not None)
        weight = cos = sin = eps = None
        num_rotating = 0
        if key_formation is not None:
            num_positions, num_rotating = key_formation.cos.shape
            weight = _address(key_formation.norm_weight, head_dim)
            cos = _address(key_formation.cos, num_positions * num_rotating)
            sin = _address(key_formation.sin, num_positions * num_rotating)
            if key_formation.eps is not None:
                eps = ctypes.byref(REAL(key_formation.eps))
        out = query.new_empty(num_rows, num_heads * head_dim)
        self._functions.attend(
            _address(query, num_rows * num_heads * head_dim),
            num_rows,
            num_heads,
            None if key is None else _address(key, value.numel()),
            _address(value, num_blocks * block_size * num_kv_heads * head_dim),
            block_size,
            num_kv_heads,
            head_dim,
            weight,
            cos,
            sin,
            num_rotating,
            eps,
            _address(block_tables, block_tables.numel(), dtype=torch.int64),
            block_tables.shape[1],
            _address(requests, num_rows, dtype=torch.int64),
            _address(positions, num_rows, dtype=torch.int64),
            window or 0,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def top_k_experts(
        self, scores: Tensor, k: int, per_expert_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        num_rows, num_experts = scores.shape
        ids, weights = torch.empty(num_rows, k, dtype=torch.int64), scores.new_empty(num_rows, k)
        self._functions.top_k_experts(
            _address(scores, num_rows * num_experts),
            num_rows,
            num_experts,
            k,
            _address(per_expert_scale, num_experts),
            ids.data_ptr(),
            weights.data_ptr(),
        )
        return ids, weights

    def expert_partials(
        self, hidden_states: Tensor, slots: ExpertSlots, experts: LayerExperts
    ) -> Tensor:
        gate_up, down = _packed(experts.gate_up), _packed(experts.down)
        num_tokens, hidden_size = hidden_states.shape
        num_slots, num_owned = len(slots.tokens), len(experts.expert_to_group)
        partials = hidden_states.new_empty(experts.num_groups, num_tokens, hidden_size)
        hidden_states = hidden_states.contiguous()
        tokens, chosen, weights = (
            part.contiguous() for part in (slots.tokens, slots.experts, slots.weights)
        )
        self._functions.expert_partials(
            _address(hidden_states, num_tokens * hidden_size),
            num_tokens,
            hidden_size,
            _address(tokens, num_slots, dtype=torch.int64),
            _address(chosen, num_slots, dtype=torch.int64),
            _address(weights, num_slots),
            num_slots,
            _panels_address(gate_up, hidden_size, num_owned),
            _panels_address(down, gate_up.num_outputs, num_owned),
            num_owned,
            gate_up.num_outputs,
            _address(experts.expert_to_group, num_owned, dtype=torch.int64),
            experts.num_groups,
            partials.data_ptr(),
            torch.get_num_threads(),
        )
        return partials

    def expert_rows(
        self,
        hidden_states: Tensor,
        slot_table: Tensor,
        expert_to_row: Tensor,
        experts: LayerExperts,
    ) -> Tensor | None:
        gate_up, down = _packed(experts.gate_up), _packed(experts.down)
        num_tokens, hidden_size = hidden_states.shape
        num_slots, num_owned = slot_table.shape[1], len(experts.expert_to_group)
        rows = hidden_states.new_empty(experts.num_groups * num_tokens, hidden_size)
        hidden_states = hidden_states.contiguous()
        num_rows = self._functions.expert_rows(
            _address(hidden_states, num_tokens * hidden_size),
            num_tokens,
            hidden_size,
            _address(slot_table, 3 * num_slots, dtype=torch.int32),
            num_slots,
            _address(expert_to_row, len(expert_to_row), dtype=torch.int64),
            _panels_address(gate_up, hidden_size, num_owned),
            _panels_address(down, gate_up.num_outputs, num_owned),
            num_owned,
            gate_up.num_outputs,
            _address(experts.expert_to_group, num_owned, dtype=torch.int64),
            experts.num_groups,
            rows.data_ptr(),
            torch.get_num_threads(),
        )
        return None if num_rows < 0 else rows[:num_rows]


def _panels(weight: Tensor, width: int) -> Tensor:
    """Cut [..., outputs, inputs] into panels of outputs: [..., num_panels, inputs, width].

    The last panel is filled up with zeros.
    """
    assert weight.dtype is torch.float32
    *stack, num_outputs, num_inputs = weight.shape
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -num_outputs % width))
    return padded.view(*stack, -1, width, num_inputs).transpose(-1, -2).contiguous()


def _packed(weight: Weight) -> PackedWeight:
    assert isinstance(weight, PackedWeight), "packed for other kernels"
    return weight


def _address(tensor: Tensor, num_elements: int, dtype: torch.dtype = torch.float32) -> int:
    """Return the address of an argument for C++, which can't check what lies there."""
    assert tensor.numel() == num_elements and tensor.is_contiguous(), "a wrong shape or layout"
    assert tensor.dtype is dtype, f"expected {dtype}, not {tensor.dtype}"
    return tensor.data_ptr()


def _panels_address(weight: PackedWeight, num_inputs: int, *stack: int) -> int:
    """Return the address of a packed weight, or of a stack of `stack` of them."""
    *head, _, inputs, width = weight.panels.shape
    assert (*head, inputs, width) == (*stack, num_inputs, PANEL)
    return weight.panels.data_ptr()
