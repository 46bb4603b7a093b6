"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from cluster.kernels.build import native_library
from cluster.kernels.native import native_kernels

os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported: tests need no GPU


@pytest.fixture(scope="module", params=["native", "torch"])
def cpu_kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both kernels of a CPU in turn; processes that a test starts choose the same ones."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setenv("CXX", "false")  # a compiler that fails
        native_library.cache_clear()
        assert (native_kernels() is None) == (request.param == "torch")
        yield request.param
    native_library.cache_clear()
