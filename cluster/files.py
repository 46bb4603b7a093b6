"""Files that are replaced as a whole, and the bound of a Unix socket's path."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

MAX_SOCKET_PATH = 107  # bytes in the address of a Unix socket, `man 7 unix`


def write_atomic(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace a file so that no reader ever sees half of it, and create its folder.

    Args:
        path: The file.
        text: Its new content.
        mode: Who may read it.

    Raises:
        OSError: It can't be written; the file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with open(descriptor, "w") as file:
            file.write(text)
        os.chmod(draft, mode)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def write_private(path: Path, text: str) -> None:
    """Replace a file that only this user may read. Raises as `write_atomic` does."""
    write_atomic(path, text, mode=0o600)
