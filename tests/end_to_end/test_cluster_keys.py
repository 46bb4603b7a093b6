"""End to end on Ray: a cluster with keys and mutual TLS, whose Redis dies, and that starts anew."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cluster.config import Config
from cluster.errors import PermissionDenied, Unauthenticated, Unavailable
from deployments.commands.access import Access
from deployments.commands.client import Client
from deployments.commands.connect import connect_here
from deployments.process.local_access import local_key_file
from deployments.start import lifecycle
from deployments.start.lifecycle import Running
from protos.briolette.v1.admin_pb2 import Tenant
from tests.support.certificates import Authority
from tests.support.running_cluster import answer, session_pids

pytestmark = pytest.mark.cluster


@pytest.fixture
def authority() -> Iterator[Authority]:
    with tempfile.TemporaryDirectory() as folder:
        yield Authority(Path(folder))


@pytest.fixture
def config(authority: Authority) -> Iterator[Config]:
    cert_file, key_file = authority.sign("gateway")
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "gateway": {
                "port": 0,
                "metrics_port": 0,
                "auth": "keys",
                "tls_cert_file": cert_file,
                "tls_key_file": key_file,
                "tls_client_ca_file": authority.file,
            },
            "engine": {"kv_bytes": 64 << 20, "max_model_len": 1024},
            "experts": {"mode": "local"},
            "device": "cpu",
            "state_dir": f"{folder}/state",
        }
        yield Config.load(None, settings)


@contextmanager
def up(config: Config) -> Iterator[tuple[Running, Client]]:
    """The cluster and the operator's client of it."""
    running = lifecycle.start(config, lambda news: None)
    try:
        with connect_here(config) as operator:
            yield running, operator
    finally:
        lifecycle.stop(config.state_dir)


def test_keys_outlive_redis_and_the_cluster_and_are_nowhere_to_be_read(
    config: Config, authority: Authority
) -> None:
    certificate = authority.sign("client")

    def client(running: Running, key: str | None) -> Client:
        assert running.address is not None
        return Client(running.address, Access(key, True, authority.file, *certificate))

    with up(config) as (running, operator):
        secrets = [local_key_file(config.state_dir).read_text().split("_")[2]]
        key = operator.create_tenant(Tenant(name="ann", weight=2.0))
        (redis,) = (p for p in session_pids(running) if name(p) == "redis-server")
        with client(running, key) as ann:
            assert len(answer(ann, 16)) == 16
            os.kill(redis, signal.SIGKILL)
            assert len(answer(ann, 16)) == 16
            with pytest.raises(PermissionDenied):
                ann.list_tenants()
        with client(running, None) as nobody, pytest.raises(Unauthenticated):
            answer(nobody)
        assert running.address is not None
        stranger = Access(key, True, authority.file)
        with Client(running.address, stranger) as nobody, pytest.raises(Unavailable):
            answer(nobody)
    with up(config) as (running, operator):
        assert [tenant.name for tenant in operator.list_tenants()] == ["ann"]
        with client(running, key) as ann:
            assert len(answer(ann, 16)) == 16
        new = operator.rotate_key("ann", 0.0)
        with client(running, key) as ann, pytest.raises(Unauthenticated):
            answer(ann)
        secrets += [key.split("_")[2], new.split("_")[2]]
    secrets.append(local_key_file(config.state_dir).read_text().split("_")[2])
    files = [path for path in config.state_dir.rglob("*") if path.is_file()]
    found = {str(path) for path in files if any(s in contents(path) for s in secrets)}
    assert found == {str(local_key_file(config.state_dir))}


def name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return ""


def contents(path: Path) -> str:
    return path.read_bytes().decode(errors="ignore")
