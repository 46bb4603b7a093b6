"""The configuration: every key with its default, its unit and what it means."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.config_values import Renamed, build, flatten, leaves, plain, read_yaml, setting
from cluster.errors import ConfigError
from cluster.spec import KVLayout

# Former keys, which this version still understands.
RENAMED = {
    "engine.kv_rows": Renamed(
        "engine.kv_layout", {"v": "values", "raw": "projection", "split": "separate"}
    ),
    "experts.deadline_s": Renamed("experts.timeout_s"),
}

DEMO_MODEL = "demo"
DEMO_MODEL_DIR = Path(__file__).resolve().parent.parent / "demo" / "gemma4-moe-demo"
STATE_DIR = Path.home() / ".local" / "state" / "briolette"


@dataclass(frozen=True)
class GatewayConfig:
    """Where clients connect."""

    host: str = setting("127.0.0.1", "address of the gRPC server; beyond loopback it needs keys")
    port: int = setting(50051, "of the gRPC server; 0 takes a free one", "", 0, 65535)
    http_port: int | None = setting(
        8080, "of HTTP (OpenAI's API); 0 takes a free one, null is none", "", 0, 65535
    )
    auth: Literal["open", "keys"] = setting("open", "who may call: everybody, or tenants by key")
    tls_cert_file: Path | None = setting(None, "PEM, the server's own first; null: no TLS")  # noqa: RUF009
    tls_key_file: Path | None = setting(None, "PEM, of that certificate")  # noqa: RUF009
    tls_client_ca_file: Path | None = setting(None, "PEM; set, clients need certificates too")  # noqa: RUF009
    plaintext: bool = setting(False, "no TLS beyond loopback: a proxy has it; /metrics too")
    metrics_host: str = setting("127.0.0.1", "address of /metrics, of every part")
    metrics_port: int | None = setting(9464, "of /metrics; 0 takes a free one", "", 0, 65535)
    max_message_bytes: int = setting(4 << 20, "longest request", "bytes", 1 << 10, 128 << 20)


@dataclass(frozen=True)
class EngineConfig:
    """The attention side: one decoder."""

    block_size: int = setting(16, "positions in a KV block", "tokens", 1, 1024)
    max_num_batched_tokens: int = setting(512, "token budget of a step", "tokens", 1)
    max_num_seqs: int = setting(64, "requests that run at once", "requests", 1)
    max_queue: int = setting(
        256, "requests that may wait; more are refused to who has most of them", "requests", 0
    )
    max_queue_per_tenant: int = setting(64, "of these, of each tenant's", "requests", 0)
    max_queue_wait_s: float | None = setting(
        120.0, "refuse what would wait longer; null: only what would miss its deadline", "s", 0
    )
    fair_share: bool = setting(True, "share steps by tenants' weights; false: by arrival alone")
    max_model_len: int | None = setting(None, "context length; null is the model's", "tokens", 1)
    kv_bytes: int = setting(512 << 20, "KV cache on the device", "bytes", 1 << 16)
    num_blocks: int | None = setting(None, "KV blocks a group, in place of kv_bytes", "blocks", 2)
    kv_layout: KVLayout = setting(  # noqa: RUF009
        "values",
        "kept per token where K and V share a projection; projection and separate: equal bits",
    )
    prefix_caching: bool = setting(True, "don't compute again what the KV cache still holds")
    checkpoint_blocks: int = setting(
        256, "keep a sliding window every so many blocks of a prompt; 0: at its ends", "blocks", 0
    )
    shared_tenants: tuple[str, ...] = setting(
        (), "tenants that may find each other's prefixes cached; all others find their own only"
    )
    threads: int | None = setting(None, "CPU threads; null shares the cores out", "threads", 1)


@dataclass(frozen=True)
class ExpertsConfig:
    """The other side of dispatch."""

    mode: Literal["remote", "local"] = setting("remote", "in hosts of their own, or in-process")
    num_hosts: int = setting(2, "expert host processes", "processes", 1, 1024)
    num_groups: int = setting(4, "cut of a layer's experts, fixed for good", "groups", 1, 1024)
    num_copies: int = setting(1, "hosts that hold each group", "copies", 1)
    timeout_s: float = setting(1.0, "silence after which a slot is retried", "s", 0.001, 3600)
    fallback: Literal["auto", "off"] = setting(
        "auto", "auto: the decoder computes groups that lost all hosts, if they fit in free memory"
    )
    micro_batches: int = setting(1, "2 lets one compute while one waits", "", 1, 2)
    transport: Literal["auto", "tcp"] = setting("auto", "auto: shared memory where it works")
    threads: int | None = setting(None, "CPU threads a host; null shares out", "threads", 1)
    num_gpus_per_host: float | None = setting(
        None, "GPUs that Ray gives each host; null shares out", "GPUs", 0
    )


@dataclass(frozen=True)
class StoreConfig:
    """Redis or Valkey, where long contexts and sessions are kept."""

    enabled: bool = setting(True, "keep contexts and sessions in Redis, beyond a restart")
    url: str | None = setting(
        None, "redis://, rediss:// (TLS) or unix://; null starts the server that comes with us"
    )
    password_file: Path | None = setting(None, "its first line is the password")  # noqa: RUF009
    ca_file: Path | None = setting(None, "of the server's certificate; null: the system's")  # noqa: RUF009
    data_dir: Path | None = setting(None, "of our own server; null: redis in state_dir")  # noqa: RUF009
    max_bytes: int = setting(4 << 30, "memory of our own server", "bytes", 16 << 20)
    tenant_bytes: int = setting(2 << 30, "budget of each tenant", "bytes", 1 << 20)
    ttl_s: float = setting(7 * 86400.0, "an unused value is forgotten after this", "s", 1)
    queue_bytes: int = setting(1 << 30, "that may wait to be written", "bytes", 1 << 20)
    connections: int = setting(2, "for reading, each with a thread", "", 1, 64)
    timeout_s: float = setting(2.0, "without an answer counts as a failure", "s", 0.01, 60)


@dataclass(frozen=True)
class RayConfig:
    """The Ray cluster that places the processes."""

    namespace: str = setting("briolette", "Ray namespace")
    num_cpus: int | None = setting(
        None, "CPUs to declare; null starts all parts at once", "CPUs", 1
    )
    num_gpus: int | None = setting(None, "GPUs to declare; null is what is there", "GPUs", 0)
    object_store_bytes: int = setting(128 << 20, "Ray's object store", "bytes", 80 << 20)
    dashboard: bool = setting(False, "serve Ray's dashboard on loopback")
    start_timeout_s: float = setting(120.0, "without progress ends a start", "s", 1, 86400)


@dataclass(frozen=True)
class Config:
    """Everything that can be configured. `Config()` serves the demo model on this machine."""

    model: str = setting(DEMO_MODEL, "directory, hub id, or 'demo' for the shipped model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "of weights and activations; auto: float32 on a CPU, bfloat16 on a GPU"
    )
    device: str = setting("auto", "cpu, cuda, or auto: a GPU where there is one")
    batch_invariant: bool = setting(
        False, "a request's bits don't depend on the batch; slower on a GPU"
    )
    gateway: GatewayConfig = GatewayConfig()
    engine: EngineConfig = EngineConfig()
    experts: ExpertsConfig = ExpertsConfig()
    store: StoreConfig = StoreConfig()
    ray: RayConfig = RayConfig()
    state_dir: Path = setting(STATE_DIR, "logs, sockets, the running cluster's files")  # noqa: RUF009

    @staticmethod
    def load(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
        """The defaults, changed by a YAML file, changed by overrides.

        Overrides are keyed by dotted key ("engine.max_num_seqs") or nested. Raises ConfigError that
        names the key and where it stands.
        """
        known = {key for key, _, _ in settings()}
        values = {}
        if path is not None:
            values.update(flatten(read_yaml(path), str(path), known, RENAMED))
        values.update(flatten(overrides or {}, "overrides", known, RENAMED))
        config: Config = build(Config, values)
        _check_together(config)
        return config

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Config:
        """What `to_dict` wrote."""
        return Config.load(None, values)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, strings and numbers: what a Ray actor is given."""
        return plain(self)

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


def settings() -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(dotted key, default, metadata) of every setting, in order: for help texts and docs."""
    yield from leaves(Config())


def _check_together(config: Config) -> None:
    gateway, engine, experts = config.gateway, config.engine, config.experts
    is_here = is_loopback(gateway.host)
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
            is_loopback(gateway.metrics_host) or gateway.plaintext,
            f"gateway.metrics_host {gateway.metrics_host!r} shows tenants' names and loads to all "
            "who reach it, without a key or TLS: set gateway.plaintext where only those do who may",
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


def is_loopback(host: str) -> bool:
    """Whether only this machine's programs reach it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
