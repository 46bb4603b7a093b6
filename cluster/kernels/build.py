"""C++ beside a Python file, built for this machine when it is first needed.

It takes a C++ compiler (`CXX`, or g++) two seconds; the result is kept in the user's cache
directory. Where there is no compiler, slower code does the same work.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fopenmp", "-Wno-psabi"),
    *("-fPIC", "-fno-semantic-interposition"),  # inline functions of headers are inlined
)
SANITIZE = "BRIOLETTE_SANITIZE"  # set to 1: build with sanitizers, and preload gcc's libasan.so
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
TIMEOUT_S = 120.0  # for one call of the compiler


@functools.cache
def native_library(source: Path) -> ctypes.CDLL | None:
    """Build and load C++ for this machine.

    Args:
        source: a .cpp file, or a folder of them and of the headers that they include.

    Returns:
        The library; None, with a line in the log, where it can't be built.
    """
    try:
        return ctypes.CDLL(str(build_library(source)))
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


def build_library(source: Path) -> Path:
    """Return the library of a source for this compiler and processor; built unless it is there.

    Raises:
        OSError, RuntimeError, ValueError, SubprocessError: it can't be built.
    """
    flags = FLAGS + (SANITIZERS if os.environ.get(SANITIZE) == "1" else ())
    text = [file.read_text() for file in [*_files(source, "*.h"), *_files(source, "*.cpp")]]
    identity = text, flags, _run([*_compiler(), "--version"]), _processor()
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    library = _cache_dir() / f"{source.stem}-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        compile_library(source, library, flags)
    return library


def compile_library(source: Path, library: Path, flags: Sequence[str] = FLAGS) -> None:
    """Compile a source into a shared library, its files side by side.

    Args:
        source: a .cpp file, or a folder of them.
        library: the file to write; a process beside this one may build the same.
        flags: of the compiler.

    Raises:
        OSError, ValueError, SubprocessError: there is no compiler, or it fails.
    """
    compiler = _compiler()
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch, ThreadPoolExecutor() as pool:
        compiled = [Path(scratch) / f"{file.stem}.o" for file in _files(source, "*.cpp")]
        commands = [
            [*compiler, *flags, "-c", str(file), "-o", str(to)]
            for file, to in zip(_files(source, "*.cpp"), compiled, strict=True)
        ]
        list(pool.map(_run, commands))
        # Linked without OpenMP, so that it runs on the threads of PyTorch's own runtime: two
        # runtimes in one process take the cores from each other.
        sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
        linked = Path(scratch) / library.name
        _run([*compiler, *sanitizers, "-shared", *map(str, compiled), "-o", str(linked)])
        linked.replace(library)


def _files(source: Path, pattern: str) -> list[Path]:
    if source.is_dir():
        return sorted(source.glob(pattern))
    return [source] if source.match(pattern) else []


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


def _run(command: Sequence[str]) -> str:
    """Run a command and return what it prints."""
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S
    ).stdout


def _processor() -> str:
    """What the compiler's -march=native looks at: a home directory may be on several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
