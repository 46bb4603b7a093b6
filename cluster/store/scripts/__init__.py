"""How a tenant's values and sessions lie in Redis, and the Lua scripts that keep its books.

Every key of a tenant begins with `briolette:{tenant}:`, and that is all a script is told of where
to look; only save_session.lua also sees, in `briolette:tenants`, whether the tenant still exists:

    kv:<key>              a value (cluster/store/value.py), with a time to live unless it is pinned
    lru                   sorted set of the unpinned keys, by the time of their last use in ms
    size                  hash: key -> bytes, of every value
    pins                  hash: key -> number of sessions that need it, whether or not it is there
    usage                 hash: bytes of all values and sessions, and of what is pinned of them
    sessions              set of the names of the sessions
    session:<name>        hash: content, meta, version, created and used (ms)
    session-keys:<name>   list of the keys that the session needs
    session-traces:<name> set of keys that it doesn't need, and that are deleted with it

Only the scripts change the books; each runs whole or not at all, so several decoders agree. Times
are the server's own. Scripts go over the wire as text: there is no state that a restart loses.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

TOUCH, LOOK = b"touch", b"look"  # whether LOOK_UP counts as a use of the values
OVERHEAD_BYTES = 512  # of Redis for one value: its key in four places, tables, rounding


def tenant_prefix(tenant: str) -> bytes:
    """Return the beginning of all Redis keys of a tenant.

    No tenant's prefix begins another's: names are quoted, and the braces set them apart from keys
    that belong to no tenant.
    """
    return b"briolette:{%s}:" % quote(tenant, safe="").encode()


def value_name(tenant: str, key: bytes) -> bytes:
    """Return the Redis key of a value."""
    return tenant_prefix(tenant) + b"kv:" + key


def read_scripts(*paths: Path) -> str:
    """Return the Lua code of these files, one after the other, without its comments."""
    lines = (line for path in paths for line in path.read_text().splitlines())
    return "\n".join(line for line in lines if not line.lstrip().startswith("--"))


COMMON = Path(__file__).with_name("common.lua")  # the start of every script of the books


def _script(name: str) -> str:
    return read_scripts(COMMON, COMMON.with_name(f"{name}.lua"))


BOOK_VALUE = _script("book_value")
LOOK_UP = _script("look_up")
REMOVE_VALUES = _script("remove_values")
MAKE_ROOM = _script("make_room")
