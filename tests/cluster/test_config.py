"""Config: defaults, the YAML file, overrides, and the sentence for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config import (
    DEMO_MODEL_DIR,
    STATE_DIR,
    Config,
    EngineConfig,
    settings,
)
from cluster.config_values import parse_bytes, parse_overrides
from cluster.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "briolette.yaml"


def test_nothing_given_is_the_default() -> None:
    config = Config.load(None, {})
    assert config == Config() == Config.load()
    assert (config.experts.mode, config.experts.num_hosts) == ("remote", 2)
    assert (config.experts.num_copies, config.experts.num_groups) == (1, 4)
    assert config.gateway.host == "127.0.0.1"
    assert config.state_dir == STATE_DIR


def test_every_default_passes_its_own_check() -> None:
    assert Config.load(None, {setting.key: setting.default for setting in settings()}) == Config()


def test_every_setting_is_described_in_sentences() -> None:
    for setting in settings():
        key, description = setting.key, setting.description
        assert description[:1].isupper() and description.endswith("."), key
        assert (setting.unit == "bytes") == key.endswith("_bytes"), key
        assert (setting.unit == "s") == key.endswith("_s"), key


def test_settings_tell_their_range() -> None:
    by_key = {setting.key: setting for setting in settings()}
    port, gpus = by_key["gateway.http_port"], by_key["experts.num_gpus_per_host"]
    assert (port.default, port.unit, port.least, port.most) == (8080, "", 0, 65535)
    assert (gpus.default, gpus.unit, gpus.least, gpus.most) == (None, "GPUs", 0, None)


def test_overrides_go_over_the_file(path: Path) -> None:
    path.write_text(
        "model: some/model\nengine:\n  max_num_seqs: 8\n  kv_bytes: 2GiB\n"
        "experts:\nstate_dir: ~/x\n"
    )
    config = Config.load(path, {"engine.max_num_seqs": 4, "experts": {"timeout_s": 2}})
    assert config.model == config.model_source == "some/model"
    assert config.model_id == "model"
    assert config.engine == EngineConfig(max_num_seqs=4, kv_bytes=2 << 30)
    assert config.experts.timeout_s == 2.0
    assert config.state_dir == Path.home() / "x"


def test_former_keys_still_work_and_name_the_present_ones(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text("engine: {kv_rows: raw}\nexperts: {deadline_s: 3}\n")
    config = Config.load(path)
    assert (config.engine.kv_layout, config.experts.timeout_s) == ("projection", 3.0)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    assert "engine.kv_rows was renamed: write engine.kv_layout: projection." in warnings[0]
    assert Config.load(None, {"engine.kv_rows": "split"}).engine.kv_layout == "separate"
    caplog.clear()
    assert Config.from_dict(config.to_dict()) == config
    assert not caplog.records


def test_dict_round_trip() -> None:
    changes = {"engine.num_blocks": 100, "state_dir": "/tmp/x", "gateway.metrics_port": None}
    config = Config.load(None, changes)
    assert config != Config()
    assert Config.from_dict(config.to_dict()) == config
    assert_plain(config.to_dict())


def assert_plain(value: Any) -> None:
    if isinstance(value, dict):
        for inner in value.values():
            assert_plain(inner)
    elif isinstance(value, list):
        for inner in value:
            assert_plain(inner)
    else:
        assert value is None or type(value) in (str, int, float, bool)


def test_model_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Config().model_source == str(DEMO_MODEL_DIR)
    assert Config().model_id == "gemma4-moe-demo"
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)  # a relative path means another directory in another process
    assert Config.load(None, {"model": "mine"}).model_source == str(tmp_path / "mine")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("engine: {max_num_seq: 8}", "engine.max_num_seq; did you mean engine.max_num_seqs?"),
        ("max_num_seqs: 8", "unknown key max_num_seqs; did you mean engine.max_num_seqs?"),
        ("expert: {}", "unknown key expert; did you mean experts?"),
        ("zzzzz: 1", "unknown key zzzzz."),
        ("engine: 3", "engine holds keys of its own, not a value."),
        ("engine: {block_size: 0}", "engine.block_size must be at least 1, not 0."),
        ("gateway: {port: 70000}", "gateway.port must be at most 65535, not 70000."),
        ("engine: {block_size: four}", "engine.block_size must be a whole number, not 'four'."),
        ("engine: {block_size: 16.0}", "engine.block_size must be a whole number, not 16.0."),
        ("engine: {block_size: true}", "engine.block_size must be a whole number, not True."),
        ("engine: {block_size:}", "engine.block_size must be a whole number, not null."),
        ("engine: {kv_bytes: plenty}", "engine.kv_bytes must be a size: 'plenty' is not a size"),
        ("engine: {kv_bytes: 10B}", "engine.kv_bytes must be at least 65536, not 10."),
        ("experts: {mode: both}", "experts.mode must be one of remote, local, not 'both'."),
        ("experts: {mode: [local]}", "experts.mode must be one of remote, local, not ['local']."),
        ("experts: {timeout_s: .nan}", "experts.timeout_s must be a number, not nan."),
        ("batch_invariant: 1", "batch_invariant must be true or false, not 1."),
        ("model:", "model must be a text, not null."),
        ("model: ''", "model must be a text, not ''."),
        ("engine: {shared_tenants: a}", "engine.shared_tenants must be a list of texts, not 'a'."),
        ("engine: {shared_tenants: [1]}", "engine.shared_tenants must be a list of texts"),
        ("state_dir: 3", "state_dir must be a path, not 3."),
        ("engine: {kv_rows: v, kv_layout: values}", "engine.kv_layout is given twice."),
        ("engine: {kv_rows: x}", "engine.kv_layout must be one of values, projection, separate"),
        ("- 1", "must hold keys and values, not a list."),
        ("a: [", "is not valid YAML"),
    ],
)  # fmt: skip
def test_mistakes_name_the_file_and_the_key(path: Path, text: str, sentence: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Config.load(path, {})
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"gateway.host": "0.0.0.0"}, "lets others in: set gateway.auth to keys"),
        ({"gateway.host": "0.0.0.0", "gateway.auth": "keys"}, "'0.0.0.0' needs TLS"),
        ({"gateway.metrics_host": "0.0.0.0"}, "shows tenants' names and loads"),
        ({"gateway.metrics_host": "gpu.example"}, "without a key or TLS: set gateway.plaintext"),
        ({"gateway.host": "::1"}, "a name or an IPv4 address"),
        ({"gateway.tls_cert_file": "c.pem"}, "tls_key_file go together"),
        ({"gateway.tls_client_ca_file": "ca.pem"}, "needs gateway.tls_cert_file"),
        ({"gateway.auth": "keys", "store.enabled": False}, "tenants are kept in the store"),
        ({"gateway.auth": "keys", "engine.prefix_caching": False}, "needs store.enabled and"),
        ({"gateway.port": 9464}, "http_port and gateway.metrics_port can't be the same"),
        ({"gateway.http_port": 50051}, "http_port and gateway.metrics_port can't be the same"),
        ({"experts.num_copies": 3}, "experts.num_copies can't be above experts.num_hosts"),
        ({"experts.num_hosts": 5}, "experts.num_groups can't be below experts.num_hosts"),
        ({"engine.max_num_batched_tokens": 8}, "can't be below engine.max_num_seqs"),
        ({"engine.max_num_seq": 8}, "overrides: unknown key engine.max_num_seq"),
    ],
)
def test_mistakes_in_overrides(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Config.load(None, overrides)


def test_beyond_loopback_with_keys_and_tls_or_behind_a_proxy() -> None:
    files = {"gateway.tls_cert_file": "c.pem", "gateway.tls_key_file": "k.pem"}
    for how in (files, {"gateway.plaintext": True}):
        beyond = {"gateway.host": "0.0.0.0", "gateway.auth": "keys", **how}
        assert Config.load(None, beyond).gateway.metrics_host == "127.0.0.1"
    Config.load(None, {"gateway.metrics_host": "0.0.0.0", "gateway.plaintext": True})
    Config.load(None, {"gateway.metrics_host": "::1"})
    Config.load(None, files)  # on loopback TLS is a choice
    Config.load(None, {"gateway.host": "localhost", "gateway.auth": "keys"})


def test_a_missing_file_is_a_sentence(path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        Config.load(path, {})


def test_command_line_overrides() -> None:
    given = [
        "engine.max_num_seqs=8",
        "experts.timeout_s=1e-2",
        "batch_invariant=true",
        "model=a=b",
    ]
    config = Config.load(None, parse_overrides(given))
    assert config.engine.max_num_seqs == 8
    assert config.experts.timeout_s == 0.01
    assert config.batch_invariant
    assert config.model == "a=b"
    for bad in ("engine.max_num_seqs", "model=["):
        with pytest.raises(ConfigError):
            parse_overrides([bad])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1024", 1024),
        ("2GiB", 2 << 30),
        ("512 MB", 512_000_000),
        ("1.5kib", 1536),
        ("3g", 3 * 10**9),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "-1", "GiB", "1 PB", "1e3", "2GiBs"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)
