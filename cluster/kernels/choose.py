"""Which kernels compute on a device: our own, or PyTorch's."""

from __future__ import annotations

import torch

from cluster.kernels.interface import InvariantKernels, Kernels, TorchKernels
from cluster.kernels.native import NativeKernels, native_kernels


def kernels_for(
    device: torch.device | str, dtype: torch.dtype, *, batch_invariant: bool = False
) -> Kernels:
    """The fastest kernels for this device and dtype, of those that keep what is asked."""
    if torch.device(device).type == "cpu" and dtype is torch.float32:
        native = native_kernels()
        if native is not None:
            return native
    return InvariantKernels() if batch_invariant else TorchKernels()


def kernels_name(device: torch.device, dtype: torch.dtype) -> str:
    """Whose kernels these are, for an operator: "native" or "PyTorch"."""
    return "native" if isinstance(kernels_for(device, dtype), NativeKernels) else "PyTorch"
