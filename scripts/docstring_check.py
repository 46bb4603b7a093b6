"""Refuse docstrings that only make sense beside the name they describe.

A docstring is read alone in an editor's hover and on the documentation's pages, so it begins with a
verb or a noun phrase, and not as the rest of a sentence would.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
REFUSED = re.compile(r"(Of|As|The same|Who|Whose|Those|Whether it)\b(?!')")


def main() -> int:
    """Print each refused docstring as `path:line: beginning`; return the exit status."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    refused = [found for name in listed.stdout.split() for found in refused_in(Path(name))]
    print(*refused, sep="\n", end="\n" if refused else "")
    return bool(refused)


def refused_in(path: Path) -> Iterator[str]:
    """Yield the refused docstrings of one file, attribute docstrings included."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))) if REFUSED.match(text.lstrip()):
                first = text.strip().splitlines()[0]
                yield f'{path}:{node.lineno}: a docstring can\'t begin like this: "{first}"'


if __name__ == "__main__":
    sys.exit(main())
