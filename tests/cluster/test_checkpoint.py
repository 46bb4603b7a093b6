"""Checkpoints: tensors by name, sharded or not, and what is said when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.checkpoint import Checkpoint, resolve_model
from cluster.errors import CheckpointError
from cluster.spec import ModelSpec
from engine.model.model import GemmaDecoder
from engine.model.weights import CheckpointWeights
from tests.support.engine.tiny_models import make_tiny, tiny_model


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.randn(6, 4), "b": torch.arange(12).view(6, 2).bfloat16()}


@pytest.fixture
def directory(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_read(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = Checkpoint(directory)
    assert set(checkpoint.keys()) == {"a", "b"}
    assert "a" in checkpoint and "c" not in checkpoint
    assert checkpoint.shape("b") == (6, 2)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name, tuple(tensor.shape)), tensor)
        assert torch.equal(
            checkpoint.read_rows(name, range(2, 5), (6, *tensor.shape[1:])), tensor[2:5]
        )
    assert checkpoint.read_rows("a", range(6, 6)).shape == (0, 4)


def test_missing_tensor_and_wrong_shape_are_named(directory: Path) -> None:
    checkpoint = Checkpoint(directory)
    with pytest.raises(CheckpointError, match="'c' is missing"):
        checkpoint.read("c")
    with pytest.raises(CheckpointError, match="'c' is missing"):
        checkpoint.read_rows("c", range(1))
    with pytest.raises(CheckpointError, match=r"'a' has shape \[6, 4\].*\[4, 6\]"):
        checkpoint.read("a", (4, 6))
    with pytest.raises(CheckpointError, match=r"'a' has shape \[6, 4\].*\[8, 4\]"):
        checkpoint.read_rows("a", range(2), (8, 4))


def test_shards_hold_the_same(tmp_path: Path) -> None:
    model = tiny_model("26b")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied, so not saved
            assert torch.equal(checkpoint.read(name), tensor)


def test_broken_directories(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no safetensors"):
        Checkpoint(directory / "nothing")
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        Checkpoint(directory)
    headers = (b"[]", b"1", b'{"a": {"data_offsets": [0, 4]}}', b'{"a": {"shape": [1]}}')
    garbage_files = [len(header).to_bytes(8, "little") + header for header in headers]
    for garbage in (b"", whole[:10], b"\xff" * 40, *garbage_files):
        path.write_bytes(garbage)
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            Checkpoint(directory)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="can't be read: Is a directory"):
        Checkpoint(directory)
    index = directory / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        Checkpoint(directory)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        Checkpoint(directory)
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors is missing"):
        Checkpoint(directory)


def test_fingerprint(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    first = Checkpoint(directory).fingerprint
    assert Checkpoint(directory).fingerprint == first
    save_file({**tensors, "a": tensors["a"] + 1}, directory / "model.safetensors")
    second = Checkpoint(directory).fingerprint
    (directory / "config.json").write_text("{}")
    assert len({first, second, Checkpoint(directory).fingerprint}) == 3


def test_fingerprint_sees_every_tensor(tmp_path: Path) -> None:
    """Experts lie in the middle of a long file."""
    tensors = {name: torch.zeros(20_000) for name in "abc"}
    prints = set()
    for name in "abc":
        save_file({**tensors, name: tensors[name] + 1}, tmp_path / "model.safetensors")
        prints.add(Checkpoint(tmp_path).fingerprint)
    assert len(prints) == 3


def test_resolve_model(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(directory)) == directory
    for name in (str(directory / "nothing"), "./nothing", "nothing", "a/b/c", "~/nothing-here"):
        with pytest.raises(CheckpointError, match="does not exist"):
            resolve_model(name)

    import huggingface_hub

    def offline(name: str, **_: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("No connection.\nDetails.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"hub .*\(No connection\)\. Check"):
        resolve_model("google/gemma-4-26B-A4B-it")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: directory)
    assert resolve_model("google/gemma-4-26B-A4B-it") == directory


def test_decoder_refuses_missing_and_misshapen_tensors(tmp_path: Path) -> None:
    make_tiny("26b", tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    spec = ModelSpec.load(tmp_path)
    for name in (
        "model.layers.3.router.per_expert_scale",
        "model.layers.0.layer_scalar",
        "model.layers.5.self_attn.k_proj.weight",
        "model.norm.weight",
    ):
        save_file({n: t for n, t in whole.items() if n != name}, path)
        with pytest.raises(CheckpointError, match=f"'{name}' is missing"):
            GemmaDecoder.load(spec, Checkpoint(tmp_path))
        save_file({**whole, name: torch.zeros(3)}, path)
        with pytest.raises(CheckpointError, match=f"'{name}' has shape"):
            GemmaDecoder.load(spec, Checkpoint(tmp_path))


def test_decoder_reads_everything_but_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny("26b", tmp_path)
    checkpoint, spec = Checkpoint(tmp_path), ModelSpec.load(tmp_path)
    read: list[str] = []
    place = CheckpointWeights._place

    def place_and_note(self: CheckpointWeights, destination: Any, name: str) -> None:
        read.append(name)
        place(self, destination, name)

    monkeypatch.setattr(CheckpointWeights, "_place", place_and_note)
    progress: list[tuple[int, int]] = []
    GemmaDecoder.load(spec, checkpoint, on_progress=lambda *args: progress.append(args))
    assert sorted(read) == sorted(n for n in checkpoint.keys() if ".experts." not in n)  # noqa: SIM118
    assert progress[-1][0] == progress[-1][1]
    assert progress == sorted(progress)
