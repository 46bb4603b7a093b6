"""NativeKernels: cluster/native.cpp, built for this machine when it is first needed; and how.

It takes a C++ compiler (`CXX`, or g++) two seconds; the result is kept in the user's cache
directory. Where there is none, PyTorch's kernels do the same work, more slowly.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.kernels import InvariantKernels, Kernels, PackedWeight, TorchKernels, Weight

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-Wno-psabi")
PANEL, LANES = 32, 16  # as in the source


def kernels_for(
    device: torch.device | str, dtype: torch.dtype, *, batch_invariant: bool = False
) -> Kernels:
    """The fastest kernels for this device and dtype, of those that keep what is asked."""
    if torch.device(device).type == "cpu" and dtype is torch.float32:
        native = native_kernels()
        if native is not None:
            return native
    return InvariantKernels() if batch_invariant else TorchKernels()


def native_kernels() -> NativeKernels | None:
    """This machine's; None where they can't be built."""
    library = native_library(SOURCE)
    return NativeKernels(library) if library else None


@functools.cache
def native_library(source: Path) -> ctypes.CDLL | None:
    """A C++ source, built for this machine; None, with a line in the log, where that fails."""
    try:
        return ctypes.CDLL(str(_built(source)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning("%s can't be built, so slower code does its work: %s", source.name, detail)
        return None


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
            x.data_ptr(),
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
        self._functions.gated_gelu(gate.data_ptr(), up.data_ptr(), up.numel(), y.data_ptr())
        return y

    def gated_mlp(self, x: Tensor, gate_up: Weight, down: Weight) -> Tensor:
        assert isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight)
        x, y = x.contiguous(), x.new_empty(x.shape[0], down.num_outputs)
        self._functions.gated_mlp(
            x.data_ptr(),
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
            x.data_ptr(),
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
            qkv.data_ptr(),
            num_rows,
            num_heads,
            num_queries,
            0 if values is None else values.shape[1],
            head_dim,
            norm_weight.data_ptr(),
            eps,
            cos.data_ptr(),
            sin.data_ptr(),
            _pointer(slots),
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
            scores.data_ptr(),
            num_rows,
            num_experts,
            k,
            per_expert_scale.data_ptr(),
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
            hidden_states.data_ptr(),
            num_tokens,
            size,
            tokens.data_ptr(),
            experts.data_ptr(),
            weights.data_ptr(),
            len(tokens),
            gate_up.panels.data_ptr(),
            down.panels.data_ptr(),
            len(expert_to_group),
            gate_up.num_outputs,
            expert_to_group.data_ptr(),
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
            hidden_states.data_ptr(),
            num_tokens,
            size,
            slot_table.data_ptr(),
            slot_table.shape[1],
            expert_to_row.data_ptr(),
            gate_up.panels.data_ptr(),
            down.panels.data_ptr(),
            len(expert_to_group),
            gate_up.num_outputs,
            expert_to_group.data_ptr(),
            num_groups,
            rows.data_ptr(),
            torch.get_num_threads(),
        )
        return None if num_rows < 0 else rows[:num_rows]


def declare(functions: ctypes.CDLL, signatures: Mapping[str, list[Any]]) -> None:
    """Tell ctypes the argument types of functions that return nothing."""
    for name, types in signatures.items():
        function = getattr(functions, name)
        function.argtypes, function.restype = types, None


def _panels(weight: Tensor, width: int) -> Tensor:
    """[..., outputs, inputs] cut into panels of `width` outputs: [..., num_panels, inputs, width].

    The last panel is filled up with zeros.
    """
    *stack, num_outputs, num_inputs = weight.shape
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -num_outputs % width))
    return padded.view(*stack, -1, width, num_inputs).transpose(-1, -2).contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _built(source: Path) -> Path:
    """The shared library for a source, this compiler and processor; built unless it is there.

    Raises OSError or SubprocessError where that fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler (Debian: apt-get install g++).")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    identity = source.read_text(), FLAGS, version.stdout, _processor()
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "briolette"
    library = cache / f"{source.stem}-{digest}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _compile(compiler, source, library)
    return library


def _compile(compiler: str, source: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        compiled, linked = Path(scratch) / "native.o", Path(scratch) / "native.so"
        # Linked without OpenMP, so that it runs on the threads of PyTorch's own runtime: two
        # runtimes in one process take the cores from each other.
        for command in (
            [compiler, *FLAGS, "-c", str(source), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked)],
        ):
            subprocess.run(command, capture_output=True, text=True, check=True)
        linked.replace(library)  # a process beside this one may build the same


def _processor() -> str:
    """What the compiler's -march=native looks at: a home directory may be on several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
