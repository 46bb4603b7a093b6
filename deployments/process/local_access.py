"""What a gateway leaves in the state directory for this machine's own commands.

In a folder that only its user may enter: the operator's key, and with TLS also a socket on which
commands need no certificate.
"""

from __future__ import annotations

import os
from pathlib import Path

from cluster.config import Config
from cluster.errors import ConfigError

MAX_SOCKET_PATH = 107  # bytes, of a Unix socket's address


def local_target(state_dir: Path, address: str) -> str:
    """What gRPC connects to from this machine."""
    socket = _folder(state_dir) / "gateway.sock"
    return f"unix:{socket}" if socket.exists() else address


def local_key_file(state_dir: Path) -> Path:
    """Where a gateway leaves the operator's key."""
    return _folder(state_dir) / "admin_key"


def read_local_key(state_dir: Path) -> str | None:
    """The operator's key; None where a gateway left none."""
    try:
        return local_key_file(state_dir).read_text()
    except OSError:
        return None


def local_socket(config: Config) -> Path | None:
    """Where the gateway listens for this machine's commands; None where its port is open to them.
    Raises ConfigError.
    """
    socket = _folder(config.state_dir) / "gateway.sock"
    if config.gateway.tls_cert_file is None:
        return None
    if len(os.fsencode(socket)) > MAX_SOCKET_PATH:
        raise ConfigError(f"{socket} is too long for a Unix socket; set a shorter state_dir.")
    return socket


def prepare_folder(state_dir: Path) -> None:
    """Before a gateway writes there: only its user may enter, and nothing is left from before."""
    folder = _folder(state_dir)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    for path in folder.iterdir():
        path.unlink()


def _folder(state_dir: Path) -> Path:
    return state_dir / "local"
