"""The options of `briolette keys` and their values."""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from cluster.config_values import parse_bytes
from cluster.errors import InvalidRequest
from cluster.tenants.tenancy import LEAST_KV_BYTES, MOST_COUNT, MOST_KV_BYTES, MOST_WEIGHT

ACTIONS = ("list", "create", "rotate", "set", "disable", "enable", "delete")
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
NONE = "none"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `briolette keys`."""
    add = parser.add_argument
    add("action", nargs="?", choices=ACTIONS, default="list", help="default: list")
    add("name", nargs="?", metavar="NAME", help="name of the tenant")
    add("--weight", metavar="W", help="share of the engine relative to other tenants; default: 1")
    add("--tokens-per-minute", metavar="N", help=f"limit of prompt and output tokens, or {NONE}")
    add("--max-in-flight", metavar="N", help=f"limit of concurrent requests, or {NONE}")
    add("--kv-bytes", metavar="SIZE", help=f"budget in the store, as in 2GiB; {NONE}: the default")
    add("--models", metavar="A,B", help=f"models that it may use; {NONE}: all")
    add("--expires", metavar="WHEN", help=f"a duration like 30d, a date like 2027-01-31, or {NONE}")
    add("--admin", action=argparse.BooleanOptionalAction, help="may manage tenants")
    add("--grace", metavar="TIME", help="with rotate: how long old keys stay valid, as in 1h")


def check(args: argparse.Namespace) -> None:
    """Raise InvalidRequest if the name is missing, or an option doesn't fit the action."""
    if args.action != "list" and args.name is None:
        raise InvalidRequest(f"The name is missing: briolette keys {args.action} NAME")
    terms = terms_of(args)
    if terms and args.action not in ("create", "set"):
        raise InvalidRequest(f"Limits are set by create and set; {args.action} takes none.")
    if args.action == "set" and not terms:
        raise InvalidRequest("Nothing to set; for example: briolette keys set NAME --weight 2")
    if args.grace is not None and args.action != "rotate":
        raise InvalidRequest("--grace is for rotate only.")


def terms_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the given fields of a Tenant; "none" resets one. Raises InvalidRequest."""
    given = {name: getattr(args, name) for name in PARSERS if getattr(args, name) is not None}
    terms: dict[str, Any] = {}
    for name, text in given.items():
        nothing: Any = [] if name == "models" else 0
        try:
            terms[name] = nothing if text == NONE else PARSERS[name](text)
        except ValueError as error:
            raise InvalidRequest(f"--{name.replace('_', '-')}: {error}.") from None
    if args.admin is not None:
        terms["admin"] = args.admin
    return terms


def seconds_of(text: str) -> float:
    """Return the seconds of a duration like 1h. Raises InvalidRequest."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhdw])", text)
    if match is None:
        raise InvalidRequest(f"{text!r} is not a time like 90s, 30m, 1h or 7d.")
    return float(match[1]) * UNITS[match[2]]


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_COUNT:
        raise ValueError(f"{text!r} is not a whole number from 1 to {MOST_COUNT:,}, nor {NONE}")
    return int(text)


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight <= MOST_WEIGHT:
        raise ValueError(f"{text!r} is not a number above 0 and up to {MOST_WEIGHT:g}")
    return weight


def _bytes(text: str) -> int:
    num_bytes = parse_bytes(text)
    if not LEAST_KV_BYTES <= num_bytes <= MOST_KV_BYTES:
        raise ValueError(f"{text} is not between {LEAST_KV_BYTES:,} and {MOST_KV_BYTES:,} bytes")
    return num_bytes


def _models(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _expiry(text: str) -> float:
    """Parse a duration from now, or a date, to seconds since the epoch."""
    if re.fullmatch(r"[0-9.]+[a-z]", text):
        return time.time() + seconds_of(text)
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(
            f"{text!r} is neither a time like 30d nor a date like 2027-01-31"
        ) from None


PARSERS: Mapping[str, Callable[[str], Any]] = {
    "weight": _weight,
    "tokens_per_minute": _count,
    "max_in_flight": _count,
    "kv_bytes": _bytes,
    "models": _models,
    "expires": _expiry,
}
