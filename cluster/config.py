"""The configuration: frozen dataclasses, one YAML file, dotted overrides, every key checked."""

from __future__ import annotations

import difflib
import ipaddress
import math
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from cluster.errors import ConfigError
from cluster.spec import KVRows

DEMO_MODEL = "demo"
DEMO_MODEL_DIR = Path(__file__).resolve().parent.parent / "demo" / "gemma4-moe-demo"
STATE_DIR = Path.home() / ".local" / "state" / "briolette"

TEXTS = tuple[str, ...]  # a list in YAML

T = TypeVar("T")


def _setting(
    default: T, text: str, unit: str = "", least: float | None = None, most: float | None = None
) -> T:
    """One key: its default, what it means, its unit and its range (both ends included)."""
    metadata = {"help": text, "unit": unit, "least": least, "most": most}
    made: T = field(default=default, metadata=metadata)  # the type checker sees the default
    return made


@dataclass(frozen=True)
class GatewayConfig:
    """Where clients connect."""

    host: str = _setting("127.0.0.1", "address of the gRPC server; beyond loopback it needs keys")
    port: int = _setting(50051, "of the gRPC server; 0 takes a free one", "", 0, 65535)
    http_port: int | None = _setting(
        8080, "of HTTP (OpenAI's API); 0 takes a free one, null is none", "", 0, 65535
    )
    auth: Literal["open", "keys"] = _setting("open", "who may call: everybody, or tenants by key")
    tls_cert_file: Path | None = _setting(None, "PEM, the server's own first; null: no TLS")  # noqa: RUF009
    tls_key_file: Path | None = _setting(None, "PEM, of that certificate")  # noqa: RUF009
    tls_client_ca_file: Path | None = _setting(None, "PEM; set, clients need certificates too")  # noqa: RUF009
    plaintext: bool = _setting(False, "no TLS beyond loopback: a proxy in front of it has it")
    metrics_host: str = _setting("127.0.0.1", "address of /metrics, of every part")
    metrics_port: int | None = _setting(9464, "of /metrics; 0 takes a free one", "", 0, 65535)
    max_message_bytes: int = _setting(4 << 20, "longest request", "bytes", 1 << 10, 128 << 20)


@dataclass(frozen=True)
class EngineConfig:
    """The attention side: one decoder."""

    block_size: int = _setting(16, "positions in a KV block", "tokens", 1, 1024)
    max_num_batched_tokens: int = _setting(512, "token budget of a step", "tokens", 1)
    max_num_seqs: int = _setting(64, "requests that run at once", "requests", 1)
    max_queue: int = _setting(
        256, "requests that may wait; more are refused to who has most of them", "requests", 0
    )
    max_queue_per_tenant: int = _setting(64, "of these, of each tenant's", "requests", 0)
    max_queue_wait_s: float | None = _setting(
        120.0, "refuse what would wait longer; null: only what would miss its deadline", "s", 0
    )
    fair_share: bool = _setting(True, "share steps by tenants' weights; false: by arrival alone")
    max_model_len: int | None = _setting(None, "context length; null is the model's", "tokens", 1)
    kv_bytes: int = _setting(512 << 20, "KV cache on the device", "bytes", 1 << 16)
    num_blocks: int | None = _setting(None, "KV blocks a group, in place of kv_bytes", "blocks", 2)
    kv_rows: KVRows = _setting(  # noqa: RUF009
        "v", "kept of a token where K = V: v and raw are one row, raw and split give equal bits"
    )
    prefix_caching: bool = _setting(True, "don't compute again what the KV cache still holds")
    checkpoint_blocks: int = _setting(
        256, "keep a sliding window every so many blocks of a prompt; 0: at its ends", "blocks", 0
    )
    shared_tenants: tuple[str, ...] = _setting(
        (), "tenants that may find each other's prefixes cached; all others find their own only"
    )
    threads: int | None = _setting(None, "CPU threads; null shares the cores out", "threads", 1)


@dataclass(frozen=True)
class ExpertsConfig:
    """The other side of dispatch."""

    mode: Literal["remote", "local"] = _setting("remote", "in hosts of their own, or in-process")
    num_hosts: int = _setting(2, "expert host processes", "processes", 1, 1024)
    num_groups: int = _setting(4, "cut of a layer's experts, fixed for good", "groups", 1, 1024)
    num_copies: int = _setting(1, "hosts that hold each group", "copies", 1)
    deadline_s: float = _setting(1.0, "silence after which a slot is retried", "s", 0.001, 3600)
    fallback: Literal["auto", "off"] = _setting(
        "auto", "auto: the decoder computes groups that lost all hosts, if they fit in free memory"
    )
    micro_batches: int = _setting(1, "2 lets one compute while one waits", "", 1, 2)
    transport: Literal["auto", "tcp"] = _setting("auto", "auto: shared memory where it works")
    threads: int | None = _setting(None, "CPU threads a host; null shares out", "threads", 1)
    num_gpus_per_host: float | None = _setting(
        None, "GPUs that Ray gives each host; null shares out", "GPUs", 0
    )


@dataclass(frozen=True)
class StoreConfig:
    """Redis or Valkey, where long contexts and sessions are kept."""

    enabled: bool = _setting(True, "keep contexts and sessions in Redis, beyond a restart")
    url: str | None = _setting(
        None, "redis://, rediss:// (TLS) or unix://; null starts the server that comes with us"
    )
    password_file: Path | None = _setting(None, "its first line is the password")  # noqa: RUF009
    ca_file: Path | None = _setting(None, "of the server's certificate; null: the system's")  # noqa: RUF009
    data_dir: Path | None = _setting(None, "of our own server; null: redis in state_dir")  # noqa: RUF009
    max_bytes: int = _setting(4 << 30, "memory of our own server", "bytes", 16 << 20)
    tenant_bytes: int = _setting(2 << 30, "budget of each tenant", "bytes", 1 << 20)
    ttl_s: float = _setting(7 * 86400.0, "an unused value is forgotten after this", "s", 1)
    queue_bytes: int = _setting(1 << 30, "that may wait to be written", "bytes", 1 << 20)
    connections: int = _setting(2, "for reading, each with a thread", "", 1, 64)
    timeout_s: float = _setting(2.0, "without an answer counts as a failure", "s", 0.01, 60)


@dataclass(frozen=True)
class RayConfig:
    """The Ray cluster that places the processes."""

    namespace: str = _setting("briolette", "Ray namespace")
    num_cpus: int | None = _setting(
        None, "CPUs to declare; null starts all parts at once", "CPUs", 1
    )
    num_gpus: int | None = _setting(None, "GPUs to declare; null is what is there", "GPUs", 0)
    object_store_bytes: int = _setting(128 << 20, "Ray's object store", "bytes", 80 << 20)
    dashboard: bool = _setting(False, "serve Ray's dashboard on loopback")
    start_timeout_s: float = _setting(120.0, "without progress ends a start", "s", 1, 86400)


@dataclass(frozen=True)
class Config:
    """Everything that can be configured. `Config()` serves the demo model on this machine."""

    model: str = _setting(DEMO_MODEL, "directory, hub id, or 'demo' for the shipped model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "auto", "of weights and activations; auto: float32 on a CPU, bfloat16 on a GPU"
    )
    device: str = _setting("auto", "cpu, cuda, or auto: a GPU where there is one")
    batch_invariant: bool = _setting(
        False, "a request's bits don't depend on the batch; slower on a GPU"
    )
    gateway: GatewayConfig = GatewayConfig()
    engine: EngineConfig = EngineConfig()
    experts: ExpertsConfig = ExpertsConfig()
    store: StoreConfig = StoreConfig()
    ray: RayConfig = RayConfig()
    state_dir: Path = _setting(STATE_DIR, "logs, sockets, the running cluster's files")  # noqa: RUF009

    @staticmethod
    def load(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
        """The defaults, changed by a YAML file, changed by overrides.

        Overrides are keyed by dotted key ("engine.max_num_seqs") or nested. Raises ConfigError that
        names the key and where it stands.
        """
        values = {}
        if path is not None:
            values.update(_flatten(_read_yaml(path), str(path)))
        values.update(_flatten(overrides or {}, "overrides"))
        config: Config = _build(Config, "", values)
        _check_together(config)
        return config

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Config:
        """What `to_dict` wrote."""
        return Config.load(None, values)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, strings and numbers: what a Ray actor is given."""
        return _to_dict(self)

    @property
    def model_source(self) -> str:
        """What to load: an absolute directory where `model` is one (or "demo"), or a hub id."""
        if self.model == DEMO_MODEL:
            return str(DEMO_MODEL_DIR)
        path = Path(self.model).expanduser()
        return str(path.resolve()) if path.exists() else self.model

    @property
    def model_id(self) -> str:
        """The name under which clients ask for the model: the last part of its path or hub id."""
        return Path(self.model_source).name


def parse_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """`["engine.max_num_seqs=8"]` from a command line, as overrides for `Config.load`."""
    overrides = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is not of the form key=value.")
        try:
            overrides[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"The value of {key.strip()} is not valid YAML: {text!r}.") from None
    return overrides


def parse_bytes(text: str) -> int:
    """A size like "2GiB", "512 MB" or "1024" in bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGT])(i?))?B?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is not a size like 512MiB or 2GB")
    number, prefix, binary = match.groups()
    scale: int = (1024 if binary else 1000) ** (" KMGT".index(prefix.upper()) if prefix else 0)
    return round(float(number) * scale)


def settings() -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(dotted key, default, metadata) of every setting, in order: for help texts and docs."""
    yield from _settings(Config(), "")


# (value, where it stands), by dotted key
_Values = dict[str, tuple[Any, str]]


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}.") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path} must hold keys and values, not a {type(tree).__name__}.")
    return tree or {}


def _flatten(tree: Mapping[Any, Any], source: str) -> _Values:
    """The leaves of a tree by dotted key, each key known."""
    return {key: (value, source) for key, value in _leaves(tree, "", source)}


def _leaves(tree: Mapping[Any, Any], prefix: str, source: str) -> Iterator[tuple[str, Any]]:
    known = {key for key, _, _ in settings()}
    sections = {key.rpartition(".")[0] for key in known} - {""}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in sections:
            if not isinstance(value, Mapping | None):
                raise ConfigError(f"{source}: {key} holds keys of its own, not a value.")
            yield from _leaves(value or {}, f"{key}.", source)
        elif key in known:
            yield key, value
        else:
            raise ConfigError(f"{source}: unknown key {key}{_did_you_mean(key, known | sections)}")


def _did_you_mean(key: str, known: set[str]) -> str:
    by_name = {name.rpartition(".")[2]: name for name in sorted(known)}
    near = difflib.get_close_matches(key, known, 1) or [
        by_name[name] for name in difflib.get_close_matches(key.rpartition(".")[2], by_name, 1)
    ]
    return f"; did you mean {near[0]}?" if near else "."


def _settings(section: Any, prefix: str) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    for item in fields(section):
        default = getattr(section, item.name)
        if is_dataclass(default):
            yield from _settings(default, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, default, item.metadata


def _build(section: type[Any], prefix: str, values: _Values) -> Any:
    hints = get_type_hints(section)
    made = {}
    for item in fields(section):
        key = prefix + item.name
        if is_dataclass(item.default):
            made[item.name] = _build(type(item.default), f"{key}.", values)
        elif key in values:
            value, source = values[key]
            try:
                made[item.name] = _checked(value, hints[item.name], item.metadata)
            except ValueError as error:
                raise ConfigError(f"{source}: {key} {error}.") from None
    return section(**made)


def _checked(value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """The value as its type wants it; ValueError completes the sentence "<key> …"."""
    if get_origin(hint) in (types.UnionType, Union):
        if value is None:
            return None
        hint = next(arg for arg in get_args(hint) if arg is not types.NoneType)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"must be one of {', '.join(get_args(hint))}, not {value!r}")
        return value
    value = _converted(value, hint, metadata["unit"])
    least, most = metadata["least"], metadata["most"]
    if least is not None and value < least:
        raise ValueError(f"must be at least {least}, not {value}")
    if most is not None and value > most:
        raise ValueError(f"must be at most {most}, not {value}")
    return value


def _converted(value: Any, hint: Any, unit: str) -> Any:
    if unit == "bytes" and isinstance(value, str):
        try:
            return parse_bytes(value)
        except ValueError as error:
            raise ValueError(f"must be a size: {error}") from None
    if hint is float and isinstance(value, str):
        value = _number(value)  # YAML 1.1 reads 1e-3 as a string
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number and math.isfinite(value):
        return float(value)
    if hint is int and is_number and isinstance(value, int):
        return value
    if hint is Path and isinstance(value, str | Path) and value != "":
        return Path(value).expanduser().absolute()  # another process has another directory
    if hint in (bool, str) and isinstance(value, hint) and value != "":
        return value
    is_list = isinstance(value, list | tuple)
    if hint == TEXTS and is_list and all(isinstance(item, str) and item for item in value):
        return tuple(value)
    shown = "null" if value is None else repr(value)
    raise ValueError(f"must be {_TYPE_NAMES[hint]}, not {shown}")


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    TEXTS: "a list of texts",
}


def _check_together(config: Config) -> None:
    gateway, engine, experts = config.gateway, config.engine, config.experts
    is_here = _is_loopback(gateway.host)
    has_tls = gateway.tls_cert_file is not None
    checks = (
        (":" not in gateway.host, "gateway.host must be a name or an IPv4 address"),
        (
            is_here or gateway.auth == "keys",
            f"gateway.host {gateway.host!r} lets others in: set gateway.auth to keys, or "
            "gateway.host to 127.0.0.1",
        ),
        (
            is_here or has_tls or gateway.plaintext,
            f"gateway.host {gateway.host!r} needs TLS: set gateway.tls_cert_file and "
            "gateway.tls_key_file, or gateway.plaintext where a proxy in front of it has TLS",
        ),
        (
            has_tls == (gateway.tls_key_file is not None),
            "gateway.tls_cert_file and gateway.tls_key_file go together",
        ),
        (
            has_tls or gateway.tls_client_ca_file is None,
            "gateway.tls_client_ca_file needs gateway.tls_cert_file",
        ),
        (
            gateway.auth == "open" or (config.store.enabled and engine.prefix_caching),
            "gateway.auth keys needs store.enabled and engine.prefix_caching: tenants are kept in "
            "the store",
        ),
        (
            _are_different(gateway.port, gateway.http_port, gateway.metrics_port),
            "gateway.port, gateway.http_port and gateway.metrics_port can't be the same",
        ),
        (
            experts.num_copies <= experts.num_hosts,
            "experts.num_copies can't be above experts.num_hosts: copies never share a host",
        ),
        (
            experts.num_groups >= experts.num_hosts,
            "experts.num_groups can't be below experts.num_hosts: a host would hold no group",
        ),
        (
            engine.max_num_batched_tokens >= engine.max_num_seqs,
            "engine.max_num_batched_tokens can't be below engine.max_num_seqs: each running "
            "request takes a token of the step's budget",
        ),
    )
    for holds, sentence in checks:
        if not holds:
            raise ConfigError(f"{sentence}.")


def _are_different(*ports: int | None) -> bool:
    given = [port for port in ports if port]  # 0 takes a free one
    return len(given) == len(set(given))


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        return False


def _to_dict(section: Any) -> dict[str, Any]:
    return {item.name: _plain(getattr(section, item.name)) for item in fields(section)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return _to_dict(value)
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
