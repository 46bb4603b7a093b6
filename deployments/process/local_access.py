"""Files by which commands on the gateway's machine reach it without a key or a certificate.

The folder `local` of the state directory, which only its user may enter, holds the operator's key
and, with TLS, a Unix socket that needs no certificate.
"""

from __future__ import annotations

import os
from pathlib import Path

from cluster.config import Config
from cluster.errors import ConfigError
from cluster.files import MAX_SOCKET_PATH


def local_target(state_dir: Path, address: str) -> str:
    """Return the gRPC target for a command on this machine.

    Args:
        state_dir: The state directory of the cluster.
        address: host:port of the gateway, for a gateway without a socket.
    """
    socket = _folder(state_dir) / "gateway.sock"
    return f"unix:{socket}" if socket.exists() else address


def local_key_file(state_dir: Path) -> Path:
    """Return the path of the operator's key."""
    return _folder(state_dir) / "admin_key"


def read_local_key(state_dir: Path) -> str | None:
    """Return the operator's key; None if there is none, as in a cluster without keys."""
    try:
        return local_key_file(state_dir).read_text()
    except OSError:
        return None


def local_socket(config: Config) -> Path | None:
    """Return the socket for this machine's commands; None if they can use the port (no TLS).

    Raises:
        ConfigError: The path is too long for a socket.
    """
    socket = _folder(config.state_dir) / "gateway.sock"
    if config.gateway.tls_cert_file is None:
        return None
    if len(os.fsencode(socket)) > MAX_SOCKET_PATH:
        raise ConfigError(f"{socket} is too long for a Unix socket; set a shorter state_dir.")
    return socket


def prepare_folder(state_dir: Path) -> None:
    """Create the folder, or empty it; only this user may enter."""
    folder = _folder(state_dir)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    for path in folder.iterdir():
        path.unlink()


def _folder(state_dir: Path) -> Path:
    return state_dir / "local"
