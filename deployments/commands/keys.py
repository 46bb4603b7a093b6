"""`briolette keys`: make tenants, list them, change their terms, rotate keys, delete."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from datetime import datetime

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deployments.commands.client import Client
from deployments.commands.key_options import seconds_of, terms_of
from deployments.commands.sessions import age, size
from protos.briolette.v1.admin_pb2 import Tenant

Command = Callable[[Client, argparse.Namespace, Console], None]


def list_keys(client: Client, args: argparse.Namespace, console: Console) -> None:
    """A table of all tenants, with the ids of their keys."""
    tenants = client.list_tenants()
    if not tenants:
        console.print("There are no tenants; make one: briolette keys create NAME")
        return
    columns = ("tenant", "keys", "weight", "tokens/min", "in flight", "KV", "models", "state")
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    now = time.time()
    for tenant in tenants:
        table.add_row(
            tenant.name,
            " ".join(key.key_id for key in tenant.keys if not key.expires or key.expires > now),
            f"{tenant.weight:g}",
            f"{tenant.tokens_per_minute:,}" if tenant.tokens_per_minute else "-",
            f"{tenant.max_in_flight}" if tenant.max_in_flight else "-",
            size(tenant.kv_bytes) if tenant.kv_bytes else "-",
            escape(", ".join(tenant.models)) or "all",
            _state(tenant, now),
        )
    console.print(table)


def create(client: Client, args: argparse.Namespace, console: Console) -> None:
    """Make a tenant and show its key, this once."""
    _show(client.create_tenant(Tenant(name=args.name, **terms_of(args))))


def rotate(client: Client, args: argparse.Namespace, console: Console) -> None:
    """Another key for a tenant."""
    _show(client.rotate_key(args.name, seconds_of(args.grace or "0s")))


def set_terms(client: Client, args: argparse.Namespace, console: Console) -> None:
    """Other terms for a tenant."""
    terms = terms_of(args)
    client.update_tenant(Tenant(name=args.name, **terms), *terms)
    console.print(f"Changed {args.name}: {', '.join(terms)}.")


def disable(client: Client, args: argparse.Namespace, console: Console) -> None:
    """Keep a tenant out."""
    client.update_tenant(Tenant(name=args.name, disabled=True), "disabled")
    console.print(f"Disabled {args.name}; requests that run go on to their end.")


def enable(client: Client, args: argparse.Namespace, console: Console) -> None:
    """Let a tenant in again."""
    client.update_tenant(Tenant(name=args.name), "disabled")
    console.print(f"Enabled {args.name}.")


def delete(client: Client, args: argparse.Namespace, console: Console) -> None:
    """Remove a tenant with its sessions and all that is kept for it."""
    client.delete_tenant(args.name)
    console.print(f"Deleted {args.name}, its sessions and what was kept for it.")


# By the word after `briolette keys`; all but the first need a name.
COMMANDS: dict[str, Command] = {
    "list": list_keys,
    "create": create,
    "rotate": rotate,
    "set": set_terms,
    "disable": disable,
    "enable": enable,
    "delete": delete,
}


def _show(key: str) -> None:
    """Alone on the standard output, so that a script can take it."""
    print(key)
    Console(stderr=True, highlight=False).print("This key is never shown again.")


def _state(tenant: Tenant, now: float) -> str:
    states = ["admin"] if tenant.admin else []
    if tenant.disabled:
        states.append("disabled")
    elif 0 < tenant.expires <= now:
        states.append(f"expired {age(now - tenant.expires)}")
    elif tenant.expires:
        states.append(f"until {datetime.fromtimestamp(tenant.expires):%Y-%m-%d}")
    return ", ".join(states) or "active"
