"""NativeKernels: native.cpp behind the interface of the kernels, for a CPU in fp32."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from cluster.kernels.build import declare, native_library
from cluster.kernels.interface import PackedWeight, Weight

SOURCE = Path(__file__).with_suffix(".cpp")
PANEL, LANES = 32, 16  # as in the source


def native_kernels() -> NativeKernels | None:
    """This machine's; None where they can't be built."""
    library = native_library(SOURCE)
    return NativeKernels(library) if library else None


class NativeKernels:
    """Implements Kernels on a CPU in fp32; a row's bits never depend on the batch."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        pointer, size, real, count = (
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_float,
            ctypes.c_int,
        )
        self._functions = functions
        signatures = {
            "linear": [pointer, size, size, pointer, size, pointer, pointer, count],
            "gated_mlp": [pointer, size, size, pointer, size, pointer, size, pointer, count],
            "gated_gelu": [pointer, pointer, size, pointer],
            "rms_norm": [pointer, size, size, pointer, real, pointer, pointer, pointer, count],
            "norm_and_rotate": [pointer, *[size] * 5, pointer, real, *[pointer] * 6, count],
            "attend": [
                *[pointer, size, size, pointer, pointer, size, size, size],
                *[pointer, pointer, pointer, size, pointer],
                *[pointer, size, pointer, pointer, size, pointer, count],
            ],
            "top_k_experts": [pointer, size, size, size, pointer, pointer, pointer],
            "expert_partials": [
                *[pointer, size, size, pointer, pointer, pointer, size, pointer, pointer],
                *[size, size, pointer, size, pointer, count],
            ],
            "expert_rows": [
                *[pointer, size, size, pointer, size, pointer, pointer, pointer],
                *[size, size, pointer, size, pointer, count],
            ],
        }
        declare(functions, signatures)
        functions.expert_rows.restype = size

    def pack(self, weight: Tensor) -> PackedWeight:
        return PackedWeight(_panels(weight, PANEL), weight.shape[-2])

    def pack_gated(self, weight: Tensor) -> PackedWeight:
        gate, up = (_panels(half, LANES) for half in weight.chunk(2, dim=-2))
        return PackedWeight(torch.cat((gate, up), dim=-1), weight.shape[-2] // 2)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        assert isinstance(weight, PackedWeight)
        x, y = x.contiguous(), x.new_empty(x.shape[0], weight.num_outputs)
        self._functions.linear(
            _pointer(x),
            *x.shape,
            weight.panels.data_ptr(),
            weight.num_outputs,
            _pointer(bias),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y

    def gated_gelu(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up, y = gate.contiguous(), up.contiguous(), torch.empty_like(up)
        self._functions.gated_gelu(_pointer(gate), _pointer(up), up.numel(), y.data_ptr())
        return y

    def gated_mlp(self, x: Tensor, gate_up: Weight, down: Weight) -> Tensor:
        assert isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight)
        x, y = x.contiguous(), x.new_empty(x.shape[0], down.num_outputs)
        self._functions.gated_mlp(
            _pointer(x),
            *x.shape,
            gate_up.panels.data_ptr(),
            gate_up.num_outputs,
            down.panels.data_ptr(),
            down.num_outputs,
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return self._norm(x, weight, eps, None, None)

    def add_norm(
        self, residual: Tensor, x: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None
    ) -> Tensor:
        return self._norm(x, weight, eps, residual.contiguous(), scale)

    def _norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        eps: float,
        residual: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        size = x.shape[-1]
        self._functions.rms_norm(
            _pointer(x),
            x.numel() // size,
            size,
            _pointer(weight),
            eps,
            _pointer(residual),
            _pointer(scale),
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
        kv: tuple[Tensor, Tensor | None, Tensor] | None,
    ) -> Tensor:
        num_rows, num_heads, head_dim = qkv.shape
        query = qkv.new_empty(num_rows, num_queries, head_dim)
        cos, sin = rotation
        slots, keys, values = kv or (None, None, None)
        self._functions.norm_and_rotate(
            _pointer(qkv),
            num_rows,
            num_heads,
            num_queries,
            0 if values is None else values.shape[1],
            head_dim,
            _pointer(norm_weight),
            eps,
            _pointer(cos),
            _pointer(sin),
            _pointer(slots, torch.int64),
            query.data_ptr(),
            _pointer(keys),
            _pointer(values),
            torch.get_num_threads(),
        )
        return query

    def attend(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor,
        block_tables: Tensor,
        requests: Tensor,
        positions: Tensor,
        window: int | None,
        one_row: tuple[Tensor, Tensor, Tensor, float | None] | None = None,
    ) -> Tensor:
        """Paged attention without a scale.

        query [num_rows, num_heads, head_dim], key and value [num_blocks, block_size, num_kv_heads,
        head_dim], block_tables [num_requests, width], requests and positions [num_rows], the rows
        of a request being neighbours in order -> [num_rows, num_heads * head_dim].

        Without a key, `one_row` says how keys come from what `value` holds: the norm's weight
        [head_dim], cos and sin [num_positions, num_rotating], and, for raw rows, the norm's eps.
        """
        num_rows, num_heads, head_dim = query.shape
        out = query.new_empty(num_rows, num_heads * head_dim)
        weight, cos, sin, eps = one_row or (None, None, None, None)
        self._functions.attend(
            query.data_ptr(),
            num_rows,
            num_heads,
            _pointer(key),
            value.data_ptr(),
            *value.shape[1:],
            _pointer(weight),
            _pointer(cos),
            _pointer(sin),
            0 if cos is None else cos.shape[1],
            None if eps is None else ctypes.byref(ctypes.c_float(eps)),
            block_tables.data_ptr(),
            block_tables.shape[1],
            requests.data_ptr(),
            positions.data_ptr(),
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
            _pointer(scores),
            num_rows,
            num_experts,
            k,
            _pointer(per_expert_scale),
            ids.data_ptr(),
            weights.data_ptr(),
        )
        return ids, weights

    def expert_partials(
        self,
        hidden_states: Tensor,
        slots: tuple[Tensor, Tensor, Tensor],
        gate_up: PackedWeight,
        down: PackedWeight,
        expert_to_group: Tensor,
        num_groups: int,
    ) -> Tensor:
        """Each group's weighted sum of its experts' gated MLPs: [num_groups, num_tokens, size].

        hidden_states [num_tokens, size]; slots are tokens, experts and weights [num_slots]; gate_up
        and down are stacks, expert_to_group [num_experts].
        """
        hidden_states = hidden_states.contiguous()
        num_tokens, size = hidden_states.shape
        tokens, experts, weights = (part.contiguous() for part in slots)
        partials = hidden_states.new_empty(num_groups, num_tokens, size)
        self._functions.expert_partials(
            _pointer(hidden_states),
            num_tokens,
            size,
            _pointer(tokens, torch.int64),
            _pointer(experts, torch.int64),
            _pointer(weights),
            len(tokens),
            gate_up.panels.data_ptr(),
            down.panels.data_ptr(),
            len(expert_to_group),
            gate_up.num_outputs,
            _pointer(expert_to_group, torch.int64),
            num_groups,
            partials.data_ptr(),
            torch.get_num_threads(),
        )
        return partials

    def expert_rows(
        self,
        hidden_states: Tensor,
        slot_table: Tensor,
        expert_to_row: Tensor,
        gate_up: PackedWeight,
        down: PackedWeight,
        expert_to_group: Tensor,
        num_groups: int,
    ) -> Tensor | None:
        """`expert_partials` for slots as a frame has them, and only the rows of (group, token)
        pairs that have a slot, in order; None where an expert isn't owned.

        hidden_states [num_tokens, size]; slot_table [3, num_slots] int32; expert_to_row int64, by
        logical id, negative where the expert isn't owned.
        """
        hidden_states = hidden_states.contiguous()
        num_tokens, size = hidden_states.shape
        rows = hidden_states.new_empty(num_groups * num_tokens, size)
        num_rows = self._functions.expert_rows(
            _pointer(hidden_states),
            num_tokens,
            size,
            _pointer(slot_table, torch.int32),
            slot_table.shape[1],
            _pointer(expert_to_row, torch.int64),
            gate_up.panels.data_ptr(),
            down.panels.data_ptr(),
            len(expert_to_group),
            gate_up.num_outputs,
            _pointer(expert_to_group, torch.int64),
            num_groups,
            rows.data_ptr(),
            torch.get_num_threads(),
        )
        return None if num_rows < 0 else rows[:num_rows]


def _panels(weight: Tensor, width: int) -> Tensor:
    """[..., outputs, inputs] cut into panels of `width` outputs: [..., num_panels, inputs, width].

    The last panel is filled up with zeros.
    """
    assert weight.dtype is torch.float32
    *stack, num_outputs, num_inputs = weight.shape
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -num_outputs % width))
    return padded.view(*stack, -1, width, num_inputs).transpose(-1, -2).contiguous()


def _pointer(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
    """The address of an argument for the C++ side, which believes it whatever lies there."""
    if tensor is None:
        return None
    assert tensor.dtype is dtype
    return tensor.data_ptr()
