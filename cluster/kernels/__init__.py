"""Arithmetic on a device: PyTorch's operations, or native kernels on a CPU."""
