"""The options by which commands reach a gateway: where it is, a key for it, TLS.

This module is light, so that `briolette --help` is instant; `connect` imports gRPC.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

KEY_VARIABLE = "BRIOLETTE_API_KEY"


@dataclass(frozen=True, slots=True)
class Access:
    """The credentials that a client shows to a gateway, and those that it demands of it."""

    key: str | None = field(default=None, repr=False)
    has_tls: bool = False
    ca_file: Path | None = None  # verifies the gateway; None: the system's authorities
    cert_file: Path | None = None  # the client's own certificate
    key_file: Path | None = None  # of that certificate


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that can talk to a gateway on another machine."""
    add = parser.add_argument
    add("--address", help="host:port of a gateway; default: the one that runs on this machine")
    add("--key", help=f"API key; {KEY_VARIABLE} is safer: others can see a command line")
    add("--tls", action="store_true", help="with --address: TLS, verified by the system's CAs")
    add("--plaintext", action="store_true", help="with --address: send the key without TLS")
    add("--tls-ca", type=Path, metavar="FILE", help="TLS, verified by this CA certificate (PEM)")
    add("--tls-cert", type=Path, metavar="FILE", help="client certificate (PEM), for mutual TLS")
    add("--tls-key", type=Path, metavar="FILE", help="private key of the client certificate")
