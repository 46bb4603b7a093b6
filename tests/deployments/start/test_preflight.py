"""What is checked before a start: the memory that is added up, the sentence when it is short."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cluster.config import DEMO_MODEL_DIR, Config
from cluster.errors import ConfigError, NotEnoughMemory
from cluster.spec import ModelSpec
from deployments.start.preflight import PROCESS_BYTES, check, check_memory, memory_needed
from tests.support.certificates import Authority

SIZES = {name: t.numel() for name, t in load_file(DEMO_MODEL_DIR / "model.safetensors").items()}
NUM_EXPERT_WEIGHTS = sum(size for name, size in SIZES.items() if ".experts." in name)
NUM_OTHER_WEIGHTS = sum(SIZES.values()) - NUM_EXPERT_WEIGHTS
TABLE = SIZES["model.embed_tokens.weight"]
KV_BYTES = 64 << 20
PORTS = {"gateway.port": 0, "gateway.metrics_port": 0}


def needed(model_dir: Path = DEMO_MODEL_DIR, /, **overrides: Any) -> dict[str, int]:
    settings = {"device": "cpu", "engine.kv_bytes": KV_BYTES, **overrides}
    return memory_needed(Config.load(None, settings), ModelSpec.load(model_dir), model_dir)


def test_files_for_tls_are_read_before_anything_starts(tmp_path: Path) -> None:
    files = {"gateway.tls_cert_file": f"{tmp_path}/c.pem", "gateway.tls_key_file": f"{tmp_path}/k"}
    with pytest.raises(ConfigError, match=r"gateway\.tls_cert_file .*/c\.pem can't be read"):
        check(Config.load(None, {**PORTS, **files}))


def test_a_host_that_is_not_this_machine_is_said() -> None:
    beyond = {"gateway.auth": "keys", "gateway.plaintext": True}
    for host in ("192.0.2.1", "no-such-name.invalid"):
        with pytest.raises(ConfigError, match=f"gateway.port can't listen on {host}"):
            check(Config.load(None, {**PORTS, **beyond, "gateway.host": host}))


def test_a_socket_needs_a_short_path(tmp_path: Path) -> None:
    cert_file, key_file = Authority(tmp_path).sign("gateway")
    files = {"gateway.tls_cert_file": cert_file, "gateway.tls_key_file": key_file}
    long = {"state_dir": str(tmp_path / ("x" * 100))}
    with pytest.raises(ConfigError, match="shorter state_dir"):
        check(Config.load(None, {**PORTS, **files, **long}))


def test_each_part_is_counted_once() -> None:
    assert needed() == {
        "processes": 5 * PROCESS_BYTES,  # two expert hosts beside the other three
        "attention": 4 * (NUM_OTHER_WEIGHTS + TABLE),  # the table again, packed for the logits
        "the KV cache": KV_BYTES,
        "experts": 4 * NUM_EXPERT_WEIGHTS,
    }


def test_copies_and_hosts_cost_memory() -> None:
    many: dict[str, Any] = {"experts.num_hosts": 4, "experts.num_copies": 2}
    assert needed(**many)["experts"] == 2 * needed()["experts"]
    assert needed(**many)["processes"] == 7 * PROCESS_BYTES
    local = needed(**many, **{"experts.mode": "local"})
    assert local["experts"] == needed()["experts"] and local["processes"] == 3 * PROCESS_BYTES


def test_two_bytes_a_weight_are_half_and_nothing_is_packed() -> None:
    half = needed(dtype="bfloat16")
    assert half["experts"] == 2 * NUM_EXPERT_WEIGHTS
    assert half["attention"] == 2 * NUM_OTHER_WEIGHTS
    assert needed(batch_invariant=True) == needed()


def test_what_a_gpu_holds_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert set(needed(device="auto")) == {"processes"}
    cold = needed(device="auto", **{"experts.num_gpus_per_host": 0})
    assert set(cold) == {"processes", "experts"}
    assert set(needed(device="auto", **{"ray.num_gpus": 0})) == set(needed())


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    """Without the experts' tensors, and with a configuration that says so."""
    model = tmp_path / "dense"
    shutil.copytree(DEMO_MODEL_DIR, model)
    tensors = load_file(model / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if ".experts." not in k}, model / "model.safetensors"
    )
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"enable_moe_block": False}))
    assert "experts" not in needed(model) and needed(model)["processes"] == 3 * PROCESS_BYTES


def test_the_sentence_says_what_takes_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.load(None, {"device": "cpu", "engine.kv_bytes": 7_000_000_000})
    spec = ModelSpec.load(DEMO_MODEL_DIR)
    total = sum(memory_needed(config, spec, DEMO_MODEL_DIR).values())

    def leave(free: int) -> None:
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))

    leave(total)
    check_memory(config, spec, DEMO_MODEL_DIR)
    leave(total - 1)
    with pytest.raises(NotEnoughMemory) as caught:
        check_memory(config, spec, DEMO_MODEL_DIR)
    assert str(caught.value) == (
        "The model needs about 8.8 GB of memory (1.8 GB for processes, 0.0 GB for attention, "
        "7.0 GB for the KV cache, 0.0 GB for experts), but only 8.8 GB are free; lower "
        "engine.kv_bytes or experts.num_copies, or choose a smaller model."
    )
