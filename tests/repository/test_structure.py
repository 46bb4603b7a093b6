"""The rules of the tree: imports go one way, names are ours alone, each file tells its subject."""

from __future__ import annotations

import ast
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("cluster", "engine", "experts", "deployments", "protos", "bench")
MAY_IMPORT = {
    "cluster": set[str](),
    "engine": {"cluster"},
    "experts": {"cluster"},
    "deployments": {"cluster", "engine", "experts", "protos"},
}
ONLY_DEPLOYMENTS_KNOW = {"ray", "grpc", "grpc_health", "grpc_reflection", "grpc_status"}


def modules_of(package: str) -> list[Path]:
    return [path for path in sorted((ROOT / package).rglob("*.py")) if "_pb2" not in path.name]


def imported_packages(path: Path) -> Iterator[str]:
    """The top-level names that a file imports, wherever in the file the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    ours = set(PACKAGES) - MAY_IMPORT[package] - {package}
    for path in modules_of(package):
        assert not ours & set(imported_packages(path)), path


@pytest.mark.parametrize("package", ["cluster", "engine", "experts"])
def test_only_deployments_know_ray_and_grpc(package: str) -> None:
    for path in modules_of(package):
        assert not ONLY_DEPLOYMENTS_KNOW & set(imported_packages(path)), path


def test_the_engine_knows_no_redis() -> None:
    for path in modules_of("engine"):
        assert "redis" not in set(imported_packages(path)), path


def test_no_other_distribution_owns_our_names() -> None:
    owners = importlib.metadata.packages_distributions()
    for package in PACKAGES:
        assert set(owners.get(package, [])) <= {"briolette"}, package


@pytest.mark.parametrize("package", [*PACKAGES, "scripts", "tests"])
def test_every_file_tells_its_subject(package: str) -> None:
    for path in modules_of(package):
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, f"{path} has no first line that names its subject"
