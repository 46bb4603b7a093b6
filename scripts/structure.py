"""The structure of the code by folder: `python scripts/structure.py [CHECKOUT]` prints a table.

Columns: the folder; its entries (files and folders, without `__init__.py`); the imports between
two of its entries, each pair counted once for each direction; pairs that import each other; the
longest file and the longest Python function in the folder itself, in lines.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("cluster", "engine", "experts", "deployments", "bench")


def main() -> None:
    """Print the table as Markdown."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    modules = {
        path.relative_to(root).with_suffix("").parts: ast.parse(path.read_text())
        for package in PACKAGES
        for path in (root / package).rglob("*.py")
    }
    imports = {
        (module, target)
        for module, tree in modules.items()
        for target in imported(tree)
        if target in modules or (*target, "__init__") in modules
    }
    print("| folder | entries | imports | both ways | longest file | longest function |")
    print("|---|---|---|---|---|---|")
    for folder in sorted({module[:-1] for module in modules}):
        arrows = {
            (source[len(folder)], target[len(folder)])
            for source, target in imports
            if source[: len(folder)] == folder == target[: len(folder)]
            and min(len(source), len(target)) > len(folder)
            and source[len(folder)] != target[len(folder)]
        }
        both_ways = len({pair for pair in arrows if pair[::-1] in arrows}) // 2
        entries = [e for e in root.joinpath(*folder).iterdir() if not e.name.startswith(("_", "."))]
        files = [entry for entry in entries if entry.suffix in (".py", ".cpp", ".h")]
        longest_file = max((len(file.read_text().splitlines()) for file in files), default=0)
        longest_function = max(
            (length for m, tree in modules.items() if m[:-1] == folder for length in lengths(tree)),
            default=0,
        )
        sizes = f"{len(entries)} | {len(arrows)} | {both_ways} | {longest_file}"
        print(f"| {' / '.join(folder)} | {sizes} | {longest_function} |")


def imported(tree: ast.Module) -> Iterator[tuple[str, ...]]:
    """Yield the parts of each name that a module imports, and of the module that it comes from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            source = tuple(node.module.split("."))
            yield source
            yield from ((*source, alias.name) for alias in node.names)


def lengths(tree: ast.Module) -> Iterator[int]:
    """Yield the number of lines of each function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1


if __name__ == "__main__":
    main()
