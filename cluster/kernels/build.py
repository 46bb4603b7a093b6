"""C++ beside a Python file, built for this machine when it is first needed.

It takes a C++ compiler (`CXX`, or g++) two seconds; the result is kept in the user's cache
directory. Where there is none, slower code does the same work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-Wno-psabi")
LIMIT_S = 120.0  # for one call of the compiler


@functools.cache
def native_library(source: Path) -> ctypes.CDLL | None:
    """A C++ source, built for this machine; None, with a line in the log, where that fails."""
    try:
        return ctypes.CDLL(str(_built(source)))
    # RuntimeError: the user has no home directory; ValueError: a quote in CXX isn't closed.
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning("%s can't be built, so slower code does its work: %s", source.name, detail)
        return None


def declare(functions: ctypes.CDLL, signatures: Mapping[str, list[Any]]) -> None:
    """Tell ctypes the argument types of functions that return nothing."""
    for name, types in signatures.items():
        function = getattr(functions, name)
        function.argtypes, function.restype = types, None


def _built(source: Path) -> Path:
    """The shared library for a source, this compiler and processor; built unless it is there.

    Raises OSError, RuntimeError, ValueError or SubprocessError where that fails.
    """
    compiler = _compiler()
    identity = source.read_text(), FLAGS, _run([*compiler, "--version"]), _processor()
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    library = _cache_dir() / f"{source.stem}-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        _compile(compiler, source, library)
    return library


def _compiler() -> list[str]:
    """The words of `CXX`, which may begin with a wrapper as in "ccache g++"; or g++."""
    words = shlex.split(os.environ.get("CXX", ""))
    if not words and (found := shutil.which("g++")) is not None:
        words = [found]
    if not words:
        raise FileNotFoundError("there is no C++ compiler (Debian: apt-get install g++).")
    return words


def _cache_dir() -> Path:
    """`XDG_CACHE_HOME` counts if it is an absolute path, as its specification says."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "briolette"


def _compile(compiler: Sequence[str], source: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        compiled, linked = Path(scratch) / "native.o", Path(scratch) / "native.so"
        # Linked without OpenMP, so that it runs on the threads of PyTorch's own runtime: two
        # runtimes in one process take the cores from each other.
        _run([*compiler, *FLAGS, "-c", str(source), "-o", str(compiled)])
        _run([*compiler, "-shared", str(compiled), "-o", str(linked)])
        linked.replace(library)  # a process beside this one may build the same


def _run(command: Sequence[str]) -> str:
    """What it prints."""
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=LIMIT_S
    ).stdout


def _processor() -> str:
    """What the compiler's -march=native looks at: a home directory may be on several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
