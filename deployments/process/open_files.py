"""The limit of open files of a process, and the shares of it that connections may take."""

from __future__ import annotations

import logging
import resource

WANTED = 65536
FEW = 16384  # below this, ten thousand idle connections are too many
GRPC_PART = 5 / 8  # above it gRPC refuses connections
HTTP_PART = 1 / 4  # above it HTTP closes the connection that was idle longest

log = logging.getLogger(__name__)


def raise_limit() -> int:
    """Raise the soft limit up to WANTED, as far as the hard limit permits; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < FEW:
        log.warning(
            "Only %d files can be open at once, which limits connections; raise the hard limit "
            "(ulimit -Hn) to %d.",
            allowed,
            WANTED,
        )
    return allowed
