"""The configuration: every key with its default, its unit, its range and what it means."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.config_values import (
    AbsolutePath,
    Blocks,
    Bytes,
    Renamed,
    Requests,
    Seconds,
    Section,
    Setting,
    Texts,
    Threads,
    Tokens,
    Unit,
    merge,
    read_section,
    read_yaml,
    settings_of,
)
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


class GatewayConfig(Section):
    """Where clients connect, who may, and how."""

    host: str = "127.0.0.1"
    """The host name or IPv4 address that the gRPC and HTTP servers listen on. Beyond loopback it
    needs API keys (`gateway.auth`) and TLS."""
    port: int = Field(default=50051, ge=0, le=65535)
    """The port of the gRPC server; 0 takes a free one."""
    http_port: int | None = Field(default=8080, ge=0, le=65535)
    """The port of the HTTP server, which speaks OpenAI's API and serves the chat page; 0 takes a
    free one, null starts no HTTP server."""
    auth: Literal["open", "keys"] = "open"
    """The clients that may call: `open` admits all that reach the address, `keys` admits tenants
    by their API keys."""
    tls_cert_file: AbsolutePath | None = None
    """The server's certificate chain (PEM), its own certificate first; null serves without TLS."""
    tls_key_file: AbsolutePath | None = None
    """The private key (PEM) of the certificate in `gateway.tls_cert_file`."""
    tls_client_ca_file: AbsolutePath | None = None
    """The CA of client certificates (PEM); enables mutual TLS, and clients without a certificate
    of this CA are refused."""
    plaintext: bool = False
    """Allow addresses beyond loopback without TLS, also for /metrics. Set it only where a proxy in
    front of the gateway adds TLS."""
    metrics_host: str = "127.0.0.1"
    """The address on which every process serves /metrics."""
    metrics_port: int | None = Field(default=9464, ge=0, le=65535)
    """The port of the gateway's /metrics; 0 takes a free one, null serves none. The other processes
    take free ports."""
    max_message_bytes: Bytes = Field(default=4 << 20, ge=1 << 10, le=128 << 20)
    """The size of the largest request that is accepted."""


class EngineConfig(Section):
    """The decoder: scheduling, attention and the KV cache."""

    block_size: Tokens = Field(default=16, ge=1, le=1024)
    """The number of tokens in a KV block."""
    max_num_batched_tokens: Tokens = Field(default=512, ge=1)
    """The token budget of a step: more tokens per step speed up prompts and slow down the tokens
    of running answers."""
    max_num_seqs: Requests = Field(default=64, ge=1)
    """The number of requests that may run at once."""
    max_queue: Requests = Field(default=256, ge=0)
    """The queue length; beyond it, requests of tenants over their share of it are refused."""
    max_queue_per_tenant: Requests = Field(default=64, ge=0)
    """The number of requests that each tenant may have in the queue."""
    max_queue_wait_s: Seconds | None = Field(default=120.0, ge=0)
    """Refuse a request whose estimated time in the queue exceeds this; null refuses only requests
    that would miss their own deadline."""
    fair_share: bool = True
    """Share each step among tenants by their weights; false serves requests in order of
    arrival."""
    max_model_len: Tokens | None = Field(default=None, ge=1)
    """The longest context of a request, answer included; null is the model's, or less where
    `engine.kv_bytes` can't hold it."""
    kv_bytes: Bytes = Field(default=512 << 20, ge=1 << 16)
    """The size of the KV cache on the device."""
    num_blocks: Blocks | None = Field(default=None, ge=2)
    """The number of KV blocks of each KV cache group, in place of `engine.kv_bytes`."""
    kv_layout: KVLayout = "values"
    """What the KV cache keeps of a token where keys and values come from one projection
    (`attention_k_eq_v`): the values, the projection, or separate keys and values. The first two
    take half the memory; `projection` gives the bits of `separate`."""
    prefix_caching: bool = True
    """Reuse the KV blocks of a prompt's prefix while the cache holds them."""
    checkpoint_blocks: Blocks = Field(default=256, ge=0)
    """Keep a checkpoint of the sliding windows every so many blocks of a prompt, from which a
    later prompt can resume; 0 keeps one at the prompt's end and where prompts part."""
    shared_tenants: Texts = ()
    """Tenants whose cached prefixes are shared with one another; every other tenant finds only
    its own."""
    threads: Threads | None = Field(default=None, ge=1)
    """The CPU threads of the decoder; null divides the cores among all processes."""


class ExpertsConfig(Section):
    """The experts of a mixture-of-experts model, and the processes that hold them."""

    mode: Literal["remote", "local"] = "remote"
    """Where experts are computed: in expert hosts of their own, or in the decoder's process."""
    num_hosts: Annotated[int, Unit("processes")] = Field(default=2, ge=1, le=1024)
    """The number of expert hosts."""
    num_groups: Annotated[int, Unit("groups")] = Field(default=4, ge=1, le=1024)
    """The number of groups that each layer's experts are cut into; hosts hold whole groups. The
    cut is part of the numerics, so stored contexts are found again only under the same number."""
    num_copies: Annotated[int, Unit("copies")] = Field(default=1, ge=1)
    """The number of expert hosts that hold each group."""
    timeout_s: Seconds = Field(default=1.0, ge=0.001, le=3600)
    """A host that is silent for this long counts as failed; its part of the call is retried
    elsewhere."""
    fallback: Literal["auto", "off"] = "auto"
    """What happens to a group that has lost all its hosts: `auto` computes it in the decoder if
    it fits in free memory, `off` fails the requests."""
    micro_batches: int = Field(default=1, ge=1, le=2)
    """The number of parts that a step is cut into; with 2, one is computed while the other waits
    for its experts."""
    transport: Literal["auto", "tcp"] = "auto"
    """How decoder and hosts exchange messages: `auto` takes shared memory where it works, else
    TCP."""
    threads: Threads | None = Field(default=None, ge=1)
    """The CPU threads of each expert host; null divides the cores among all processes."""
    num_gpus_per_host: Annotated[float, Unit("GPUs")] | None = Field(default=None, ge=0)
    """The GPUs that Ray gives each expert host, in fractions if need be; null divides them among
    the processes."""


class StoreConfig(Section):
    """Redis or Valkey, which keeps long contexts, sessions and tenants."""

    enabled: bool = True
    """Keep contexts and sessions in Redis, where they outlive a restart."""
    url: str | None = None
    """The server's URL: redis://, rediss:// (TLS) or unix://; null starts the server that comes
    with Briolette."""
    password_file: AbsolutePath | None = None
    """A file whose first line is the server's password."""
    ca_file: AbsolutePath | None = None
    """The CA of the server's certificate (PEM); null trusts the system's CAs."""
    data_dir: AbsolutePath | None = None
    """The directory of our own server's data; null is `redis` in `state_dir`."""
    max_bytes: Bytes = Field(default=4 << 30, ge=16 << 20)
    """The memory of our own server; beyond it, values that were not used for longest are
    evicted."""
    tenant_bytes: Bytes = Field(default=2 << 30, ge=1 << 20)
    """The budget of each tenant that has none of its own."""
    ttl_s: Seconds = Field(default=7 * 86400.0, ge=1)
    """A value that is not used for this long is forgotten."""
    queue_bytes: Bytes = Field(default=1 << 30, ge=1 << 20)
    """The size of the queue of values that wait to be written; beyond it, values are dropped."""
    connections: int = Field(default=2, ge=1, le=64)
    """The number of connections that read values, each with a thread."""
    timeout_s: Seconds = Field(default=2.0, ge=0.01, le=60)
    """A call that gets no byte for this long has failed."""


class RayConfig(Section):
    """The Ray cluster that starts and watches the processes."""

    namespace: str = "briolette"
    """The Ray namespace of the application."""
    num_cpus: Annotated[int, Unit("CPUs")] | None = Field(default=None, ge=1)
    """The CPUs that Ray is told of, which is also how many processes it starts at once; null is
    enough to start all of them together."""
    num_gpus: Annotated[int, Unit("GPUs")] | None = Field(default=None, ge=0)
    """The GPUs that Ray is told of; null is what it finds."""
    object_store_bytes: Bytes = Field(default=128 << 20, ge=80 << 20)
    """The size of Ray's object store."""
    dashboard: bool = False
    """Serve Ray's dashboard on loopback."""
    start_timeout_s: Seconds = Field(default=120.0, ge=1, le=86400)
    """A start that makes no progress for this long has failed."""


class Config(Section):
    """Everything that can be configured. `Config()` serves the demo model on this machine."""

    model: str = DEMO_MODEL
    """A directory with a checkpoint, a Hugging Face hub id, or `demo` for the model that comes
    with Briolette."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The type of weights and activations; `auto` is float32 on a CPU and bfloat16 on a GPU."""
    device: str = "auto"
    """A device as torch names it, such as `cpu` or `cuda`; `auto` takes a GPU where there is
    one."""
    batch_invariant: bool = False
    """Compute every request to the same bits, whatever else is in its batch; slower on a GPU."""
    gateway: GatewayConfig = GatewayConfig()
    engine: EngineConfig = EngineConfig()
    experts: ExpertsConfig = ExpertsConfig()
    store: StoreConfig = StoreConfig()
    ray: RayConfig = RayConfig()
    state_dir: AbsolutePath = STATE_DIR
    """The directory of logs, sockets and the running cluster's files."""

    @staticmethod
    def load(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
        """Take the defaults, changed by a YAML file, changed by overrides.

        Overrides are keyed by dotted key ("engine.max_num_seqs") or nested. Raises ConfigError that
        names the key and where it stands.
        """
        values = {} if path is None else read_section(Config, read_yaml(path), str(path), RENAMED)
        above = read_section(Config, overrides or {}, "overrides", RENAMED)
        config = Config.model_validate(merge(values, above))
        _check_together(config)
        return config

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Config:
        """Read what `to_dict` wrote."""
        return Config.load(None, values)

    def to_dict(self) -> dict[str, Any]:
        """Write plain dicts, lists, strings and numbers: what a Ray actor is given."""
        return self.model_dump(mode="json")

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


def settings() -> Iterator[Setting]:
    """Yield every setting in order: for help texts and the documentation."""
    yield from settings_of(Config)


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
