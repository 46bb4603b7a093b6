"""Which kernels compute on a device: our own, or PyTorch's."""

from __future__ import annotations

import torch

from cluster.kernels.interface import Kernels
from cluster.kernels.native import native_kernels
from cluster.kernels.torch_kernels import InvariantKernels, TorchKernels


def kernels_for(
    device: torch.device | str, dtype: torch.dtype, *, batch_invariant: bool = False
) -> Kernels:
    """Return the fastest kernels for a device and dtype that keep batch_invariant where asked."""
    if torch.device(device).type == "cpu" and dtype is torch.float32:
        native = native_kernels()
        if native is not None:
            return native
    return InvariantKernels() if batch_invariant else TorchKernels()
