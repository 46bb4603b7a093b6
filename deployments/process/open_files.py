"""How many files this process may open, and what parts of them connections may take."""

from __future__ import annotations

import logging
import resource

WANTED = 65536
FEW = 16384  # too few for ten thousand connections that say nothing
GRPC_PART = 5 / 8  # gRPC lets nobody in above it
HTTP_PART = 1 / 4  # above it whoever was silent longest makes room

log = logging.getLogger(__name__)


def raise_limit() -> int:
    """Ask for as many as may be, up to WANTED; how many there are then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < FEW:
        log.warning(
            "At most %d files can be open here, and so fewer connections; raise the hard limit "
            "(ulimit -Hn) to %d for more.",
            allowed,
            WANTED,
        )
    return allowed
