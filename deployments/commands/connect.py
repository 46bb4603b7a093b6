"""A client for the gateway that a command line names, or for the one on this machine."""

from __future__ import annotations

import argparse
import os

from cluster.config import Config, is_loopback
from cluster.errors import ConfigError, Unavailable
from deployments.commands.access import KEY_VARIABLE, Access
from deployments.commands.client import Client
from deployments.process.local_access import local_target, read_local_key
from deployments.start.lifecycle import find_running


def connect(config: Config, args: argparse.Namespace) -> Client:
    """Connect to the gateway of `--address`, else to the one that runs on this machine.

    Raises:
        ConfigError: A key would leave this machine in plain text.
        Unavailable: No `--address` is given and no cluster is running.
    """
    if args.address is None:
        return connect_here(config, args.key)
    files = (args.tls_ca, args.tls_cert, args.tls_key)
    has_tls = args.tls or any(file is not None for file in files)
    key = args.key or os.environ.get(KEY_VARIABLE)
    if key and not (has_tls or args.plaintext or _is_here(args.address)):
        raise ConfigError(
            f"The key would be sent to {args.address} unencrypted: add --tls or --tls-ca FILE, "
            "or --plaintext to send it all the same."
        )
    return Client(
        args.address,
        Access(
            key=key,
            has_tls=has_tls,
            ca_file=args.tls_ca,
            cert_file=args.tls_cert,
            key_file=args.tls_key,
        ),
    )


def connect_here(config: Config, key: str | None = None) -> Client:
    """Connect to the gateway that runs on this machine, with the operator's key if none is given.

    Raises:
        Unavailable: No cluster is running in the configuration's state_dir, or it still starts.
    """
    running = find_running(config.state_dir)
    if running is None:
        raise Unavailable("Nothing is running; start it: briolette up")
    if running.address is None:
        raise Unavailable("The cluster is still starting.")
    key = key or os.environ.get(KEY_VARIABLE) or read_local_key(config.state_dir)
    return Client(local_target(config.state_dir, running.address), Access(key))


def _is_here(address: str) -> bool:
    """Return whether a connection to this address stays on this machine."""
    return address.startswith("unix:") or is_loopback(address.rpartition(":")[0].strip("[]"))
