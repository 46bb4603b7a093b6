"""How commands reach a gateway, here or elsewhere: where it is, a key for it, TLS."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import Config, is_loopback
from cluster.errors import ConfigError, Unavailable
from deployments.process.local_access import local_target, read_local_key
from deployments.start.lifecycle import find_running

if TYPE_CHECKING:
    from deployments.commands.client import Client  # brings grpc along

KEY_VARIABLE = "BRIOLETTE_API_KEY"


@dataclass(frozen=True, slots=True)
class Access:
    """What a client shows to a gateway, and what it asks of it."""

    key: str | None = field(default=None, repr=False)
    has_tls: bool = False
    ca_file: Path | None = None  # of the gateway's certificate; None: the usual ones
    cert_file: Path | None = None  # the client's own, and its key
    key_file: Path | None = None


def connect(config: Config, args: argparse.Namespace) -> Client:
    """The gateway that the options of `add_options` name, else the one that runs here. Raises
    ConfigError where a key would be shown in plain text beyond this machine.
    """
    from deployments.commands.client import Client

    if args.address is None:
        return connect_here(config, args.key)
    files = (args.tls_ca, args.tls_cert, args.tls_key)
    has_tls = args.tls or any(file is not None for file in files)
    key = args.key or os.environ.get(KEY_VARIABLE)
    if key and not (has_tls or args.plaintext or _is_here(args.address)):
        raise ConfigError(
            f"A key would be sent to {args.address} for all on the way to read: add --tls, or "
            "--tls-ca FILE; --plaintext sends it all the same."
        )
    return Client(args.address, Access(key, has_tls, *files))


def connect_here(config: Config, key: str | None = None) -> Client:
    """The gateway that runs here. The operator's key is shown where no other one is given. Raises
    Unavailable where nothing runs.
    """
    from deployments.commands.client import Client

    running = find_running(config.state_dir)
    if running is None:
        raise Unavailable("Nothing is running; start it: briolette up")
    if running.address is None:
        raise Unavailable("The cluster is still starting.")
    key = key or os.environ.get(KEY_VARIABLE) or read_local_key(config.state_dir)
    return Client(local_target(config.state_dir, running.address), Access(key))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of commands that can talk to a gateway elsewhere."""
    add = parser.add_argument
    add("--address", help="host:port of a gateway; default: the one that is running")
    add("--key", help=f"API key; better in {KEY_VARIABLE}, since others can see a command line")
    add("--tls", action="store_true", help="with --address: TLS, by the usual authorities")
    add("--plaintext", action="store_true", help="with --address: show the key without TLS")
    add("--tls-ca", type=Path, metavar="FILE", help="TLS, by this authority's certificate")
    add("--tls-cert", type=Path, metavar="FILE", help="the client's own certificate, and")
    add("--tls-key", type=Path, metavar="FILE", help="its key, where the gateway asks for them")


def _is_here(address: str) -> bool:
    """Whether what is sent there stays on this machine."""
    return address.startswith("unix:") or is_loopback(address.rpartition(":")[0].strip("[]"))
