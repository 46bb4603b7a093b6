"""Private files: whole or not at all, their user's alone, and nothing left of those that fail."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cluster.files import write_private


def test_it_replaces_what_was_there_and_only_its_user_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for text in ("one", "two"):
        write_private(path, text)
        assert path.read_text() == text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_what_others_have_laid_out_is_not_written_to(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    for name in (f".file.{os.getpid()}", "file"):
        (tmp_path / name).symlink_to(theirs)
    write_private(tmp_path / "file", "ours")
    assert theirs.read_text() == "theirs" and (tmp_path / "file").read_text() == "ours"


def test_a_write_that_fails_leaves_all_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_private(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_private(path, "\udcff")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
