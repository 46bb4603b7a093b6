"""The C++ under the address and undefined-behaviour sanitizers: its own tests find nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.kernels.build import SANITIZE, build_library
from cluster.kernels.native import SOURCE
from experts.routed_tokens import SOURCE as ROUTED_TOKENS

TESTS = ("tests/cluster/kernels/test_native.py", "tests/experts/test_routed_tokens.py")
TIMEOUT_S = 240.0


def find_libasan() -> Path | None:
    """Return gcc's libasan.so; None where gcc or the library is missing."""
    command = ["g++", "-print-file-name=libasan.so"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    path = Path(found)  # the bare name where gcc has no such file
    return path if path.is_absolute() and path.exists() else None


@pytest.mark.skipif(SANITIZE in os.environ, reason="this is the sanitized run itself")
@pytest.mark.skipif(find_libasan() is None, reason="gcc has no libasan here")
@pytest.mark.timeout(TIMEOUT_S + 30)
def test_the_kernel_tests_pass_under_sanitizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SANITIZE, "1")
    for source in (SOURCE, ROUTED_TOKENS):
        build_library(source)  # here, so that the compiler runs without the preloaded library
    environment = os.environ | {
        "LD_PRELOAD": str(find_libasan()),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "OMP_NUM_THREADS": "2",
    }
    run = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(
        [*run, "-k", "not narrower and not cannot_be_built and not compiler"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
