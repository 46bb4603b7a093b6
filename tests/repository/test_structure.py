"""The rules of the tree: names are ours alone, folders are small, each file tells its subject."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
from collections import Counter
from pathlib import Path, PurePath

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("cluster", "engine", "experts", "deployments", "protos", "bench")
MOST_ENTRIES = 16


def modules_of(package: str) -> list[Path]:
    return [path for path in sorted((ROOT / package).rglob("*.py")) if "_pb2" not in path.name]


def tracked_files() -> list[PurePath]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [PurePath(line) for line in listed.stdout.splitlines() if (ROOT / line).exists()]


def is_test(module: str) -> bool:
    return module.rpartition(".")[2].startswith("test_")


def test_no_test_module_is_imported() -> None:
    """What tests share lies in tests/support and in conftest.py files."""
    imported = re.compile(r"^ *(from|import) tests\.([a-z_.]+\.)?test_", re.MULTILINE)
    for path in (*modules_of("tests"), *modules_of("bench")):
        assert not imported.search(path.read_text()), path


def test_no_other_distribution_owns_our_names() -> None:
    owners = importlib.metadata.packages_distributions()
    for package in PACKAGES:
        assert set(owners.get(package, [])) <= {"briolette"}, package


def test_no_folder_shows_more_entries_than_fit_in_a_glance() -> None:
    """Generated stubs, `__init__.py`, the checkout's root and docs/, which the site's navigation
    and the numbers of decisions order, don't count.
    """
    written = [
        path for path in tracked_files() if "_pb2" not in path.name and path.name != "__init__.py"
    ]
    entries = {entry for path in written for entry in (path, *path.parents) if entry.name}
    sizes = Counter(
        entry.parent for entry in entries if entry.parent.name and entry.parts[0] != "docs"
    )
    assert not {str(path): size for path, size in sizes.items() if size > MOST_ENTRIES}


@pytest.mark.parametrize("package", [*PACKAGES, "scripts", "tests"])
def test_every_file_tells_its_subject(package: str) -> None:
    for path in modules_of(package):
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, f"{path} has no first line that names its subject"


@pytest.mark.parametrize("package", ["cluster", "engine", "experts", "deployments"])
def test_every_broad_except_names_its_border(package: str) -> None:
    for path in modules_of(package):
        lines = path.read_text().splitlines()
        for index, line in enumerate(lines):
            if re.match(r"\s*except \(?Exception\b", line):
                here = "\n".join(lines[max(0, index - 1) : index + 1])
                assert "# border: " in here, f"{path}:{index + 1} doesn't say which border it is"
