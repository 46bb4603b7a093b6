"""TLS as the configuration wants it, for gRPC and for HTTP, with or without clients' certificates.

The files are read at the start; a renewed certificate takes a restart.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from cluster.config import GatewayConfig
from cluster.errors import ConfigError


def server_context(config: GatewayConfig) -> ssl.SSLContext | None:
    """For an HTTP server; None for plain text. Raises ConfigError for files that can't be used."""
    if config.tls_cert_file is None or config.tls_key_file is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _read(config.tls_cert_file, "gateway.tls_cert_file")
    _read(config.tls_key_file, "gateway.tls_key_file")
    try:
        # An encrypted key would have us ask on a terminal that isn't there.
        context.load_cert_chain(config.tls_cert_file, config.tls_key_file, password=lambda: "")
    except ssl.SSLError as error:
        raise ConfigError(
            f"gateway.tls_cert_file {config.tls_cert_file} and gateway.tls_key_file "
            f"{config.tls_key_file} can't be used: {_reason(error)}."
        ) from None
    if (ca_file := config.tls_client_ca_file) is not None:
        _read(ca_file, "gateway.tls_client_ca_file")
        try:
            context.load_verify_locations(ca_file)
        except ssl.SSLError as error:
            raise ConfigError(
                f"gateway.tls_client_ca_file {ca_file} can't be used: {_reason(error)}."
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def server_credentials(config: GatewayConfig) -> grpc.ServerCredentials | None:
    """For a gRPC server; None for plain text. Raises ConfigError as `server_context` does."""
    if server_context(config) is None:
        return None
    assert config.tls_cert_file is not None and config.tls_key_file is not None
    pair = (config.tls_key_file.read_bytes(), config.tls_cert_file.read_bytes())
    ca_file = config.tls_client_ca_file
    return grpc.ssl_server_credentials(
        [pair],
        root_certificates=None if ca_file is None else ca_file.read_bytes(),
        require_client_auth=ca_file is not None,
    )


def _read(path: Path, key: str) -> None:
    try:
        path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key} {path} can't be read: {error.strerror}.") from None


def _reason(error: ssl.SSLError) -> str:
    reason = (error.reason or str(error)).replace("_", " ").lower()
    return {
        "key values mismatch": "the key belongs to another certificate",
        "bad decrypt": "the key is encrypted; decrypt it",
    }.get(reason, reason)
