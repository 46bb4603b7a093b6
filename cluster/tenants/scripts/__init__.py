"""The Lua scripts of tenants: their directory, their sessions and their usage."""

from __future__ import annotations

from pathlib import Path

from cluster.store.scripts import COMMON, read_scripts


def _script(*names: str, after: tuple[Path, ...] = ()) -> str:
    return read_scripts(*after, *(Path(__file__).with_name(f"{name}.lua") for name in names))


def _session_script(name: str) -> str:
    return _script("session_common", name, after=(COMMON,))


READ_DIRECTORY = _script("directory_head", "read_directory")
CHANGE_DIRECTORY = _script("directory_head", "change_directory")
RESTORE_DIRECTORY = _script("directory_head", "restore_directory")

SAVE_SESSION = _session_script("save_session")
LOAD_SESSION = _session_script("load_session")
LIST_SESSIONS = _session_script("list_sessions")
DELETE_SESSION = _session_script("delete_session")
SESSION_NAMES = _script("session_names")

ADD_USAGE = _script("add_usage")
