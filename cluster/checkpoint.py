"""Tensors by name from a Hugging Face checkpoint, reading only what is asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import KeysView
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cluster.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model"]
NUM_SAMPLES, SAMPLE_BYTES = 4, 1024  # of each tensor, spread over it, for the fingerprint


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a tensor lies."""

    path: Path
    shape: tuple[int, ...]


class Checkpoint:
    """The safetensors of one model directory, sharded or not.

    Opening reads the files' headers only; tensors are mapped when read. Raises CheckpointError when
    the directory holds no readable checkpoint.
    """

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self._paths = _checkpoint_files(model_dir)
        self._entries = {
            name: _Entry(path, tuple(entry["shape"]))
            for path in self._paths
            for name, entry in _read_header(path).items()
        }
        self._handles: dict[Path, Any] = {}  # safetensors has no type for its handle

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def keys(self) -> KeysView[str]:
        """The names of all tensors."""
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; CheckpointError if there is none of that name."""
        return self._entry(name, None).shape

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """A tensor in the checkpoint's dtype, on the CPU.

        Raises CheckpointError, naming the tensor, if it is missing or not of `shape`.
        """
        entry = self._entry(name, shape)
        try:
            tensor: torch.Tensor = self._handle(entry.path).get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"Tensor {name!r} in {entry.path} can't be read: {error}."
            ) from None
        return tensor

    def read_rows(
        self, name: str, rows: range, shape: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """Rows of dim 0 of a tensor (the experts that a host owns), without reading the others.

        `rows` is a contiguous range; `shape` is of the whole tensor. Errors as in `read`.
        """
        assert rows.step == 1
        entry = self._entry(name, shape)
        assert 0 <= rows.start <= rows.stop <= entry.shape[0]
        try:
            part = self._handle(entry.path).get_slice(name)
            tensor: torch.Tensor = part[rows.start : rows.stop]
        except SafetensorError as error:
            raise CheckpointError(
                f"Tensor {name!r} in {entry.path} can't be read: {error}."
            ) from None
        return tensor

    @cached_property
    def fingerprint(self) -> str:
        """Tells two checkpoints apart without reading them: a hash of the configuration, of every
        file's header (names, dtypes, shapes, offsets) and of samples of every tensor.
        """
        digest = hashlib.sha256()
        config = self.model_dir / "config.json"
        digest.update(config.read_bytes() if config.exists() else b"")
        for path in self._paths:
            entries = _read_header(path)
            with path.open("rb", buffering=0) as file:
                size = int.from_bytes(file.read(8), "little")
                digest.update(file.read(size))
                for entry in entries.values():
                    start, stop = entry["data_offsets"]
                    last = max(start, stop - SAMPLE_BYTES)
                    for part in range(NUM_SAMPLES):
                        file.seek(8 + size + start + (last - start) * part // (NUM_SAMPLES - 1))
                        digest.update(file.read(min(SAMPLE_BYTES, stop - start)))
        return digest.hexdigest()

    def _entry(self, name: str, shape: tuple[int, ...] | None) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(f"Tensor {name!r} is missing in {self.model_dir}.")
        if shape is not None and entry.shape != tuple(shape):
            raise CheckpointError(
                f"Tensor {name!r} has shape {list(entry.shape)}; the config asks for {list(shape)}."
            )
        return entry

    def _handle(self, path: Path) -> Any:
        handle = self._handles.get(path)
        if handle is None:
            handle = self._handles[path] = safe_open(path, framework="pt")
        return handle


def resolve_model(name: str) -> Path:
    """The directory of a model: `name` itself if it is one, else a hub id, downloaded if need be.

    Raises CheckpointError with what to change when there is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"Model directory {name!r} does not exist.")
    import huggingface_hub  # half a second that a local model needn't pay

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except (OSError, ValueError) as error:  # every hub error is one of these
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise CheckpointError(
            f"{name!r} is no local directory, and the Hugging Face hub doesn't give it ({reason}). "
            "Check the name and the network, or download it and give its directory."
        ) from error


def _checkpoint_files(model_dir: Path) -> list[Path]:
    index = model_dir / INDEX_NAME
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            raise CheckpointError(f"{index} is not a safetensors index.") from None
        paths = [model_dir / name for name in names]
    else:
        paths = [model_dir / "model.safetensors"]
        if not paths[0].exists():
            paths = sorted(model_dir.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{model_dir} holds no safetensors file.")
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"Checkpoint file {path} is missing.")
    return paths


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    """A safetensors file's header (8 bytes of length, then that many of JSON) without metadata;
    `shape` and `data_offsets` of every tensor are there.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(size) if size <= path.stat().st_size else b""
        entries: dict[str, dict[str, Any]] = json.loads(header)
        entries.pop("__metadata__", None)
        end = 0
        for entry in entries.values():
            _, stop = map(int, entry["data_offsets"])
            end = max(end, stop)
            tuple(map(int, entry["shape"]))
        is_whole = 8 + size + end <= path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}.") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is not a safetensors file.") from None
    if not is_whole:
        raise CheckpointError(f"{path} is cut short; download it again.")
    return entries
