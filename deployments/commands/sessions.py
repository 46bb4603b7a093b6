"""`briolette sessions`: list kept conversations, show, park, resume and delete them."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deployments.commands.client import Client
from protos.briolette.v1.sessions_pb2 import Session

Command = Callable[[Client, str, Console], None]


def list_sessions(client: Client, _: str, console: Console) -> None:
    """A table of all, the last used one first."""
    sessions = client.list_sessions()
    if not sessions:
        console.print("There are no sessions; begin one: briolette chat --session NAME")
        return
    table = Table(
        "session", "tokens", "size", "used", "begun", "where", box=None, padding=(0, 2, 0, 0)
    )
    now = time.time()
    for session in sessions:
        table.add_row(
            escape(session.name),
            f"{session.num_tokens:,}",
            size(session.num_bytes),
            age(now - session.last_used),
            age(now - session.created),
            _where(session),
        )
    console.print(table)


def show(client: Client, name: str, console: Console) -> None:
    """What was said in it."""
    for message in client.get_session(name).messages:
        if message.thought:
            console.print(f"[dim]{escape(message.thought)}[/]")
        for call in message.tool_calls:
            called = escape(f"{call.name} {call.arguments}")
            console.print(f"[bold]{message.role} calls:[/] {called}")
        if message.content or not message.tool_calls:
            console.print(f"[bold]{message.role}:[/] {escape(message.content)}")


def park(client: Client, name: str, console: Console) -> None:
    """Free the memory that holds it."""
    answer = client.park_session(name)
    console.print(
        f"Parked {escape(name)}: {size(answer.freed_bytes)} of memory are free again, "
        f"{size(answer.session.num_bytes)} are in the store{_lack(answer.session)}."
    )


def resume(client: Client, name: str, console: Console) -> None:
    """Bring it into memory ahead of the next question."""
    answer = client.resume_session(name)
    console.print(
        f"{escape(name)} is in memory after {answer.total_s:.2f} s: of its tokens "
        f"{answer.memory_tokens:,} were there, {answer.store_tokens:,} came from the store, "
        f"{answer.computed_tokens:,} were computed."
    )


def delete(client: Client, name: str, console: Console) -> None:
    """Remove it from memory and from the store."""
    client.delete_session(name)
    console.print(f"Deleted {escape(name)}.")


# By the word after `briolette sessions`; all but the first need a name.
COMMANDS: dict[str, Command] = {
    "list": list_sessions,
    "show": show,
    "park": park,
    "resume": resume,
    "delete": delete,
}


def size(num_bytes: int) -> str:
    """With three digits at least: 1.23 MB, 45.6 GB."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{num_bytes} B" if unit == "B" else f"{value:.3g} {unit}"


def age(seconds: float) -> str:
    """In the largest unit of which there is one, as in "3 min ago"."""
    for unit, unit_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= unit_s:
            return f"{int(seconds // unit_s)} {unit} ago"
    return f"{max(0, int(seconds))} s ago"


def _where(session: Session) -> str:
    if not session.HasField("tokens_in_memory"):
        return "store" + _lack(session)
    return ("memory" if session.tokens_in_memory else "parked") + _lack(session)


def _lack(session: Session) -> str:
    missing = session.missing_values
    return f"; the store lacks {missing:,} of its values" if missing else ""
