"""Hooks of mkdocs: pages made from the code and from the texts beside README.md, never committed.

mkdocs calls the functions that begin with `on_`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from cluster.config import settings
from cluster.config_values import Setting
from deployments.cli import make_parser

ROOT = Path(__file__).parent.parent
TEXTS = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "demo-model.md": "demo/gemma4-moe-demo/README.md",
}
PACKAGES = ("engine", "experts", "cluster")
STYLE = """.md-grid { max-width: 74rem }
.md-typeset td code { word-break: normal }
"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add what has a page for each file to the navigation: decisions and Python packages."""
    nav = {title: pages for entry in config.nav[1:] for title, pages in entry.items()}
    decisions = sorted(path.name for path in (ROOT / "docs/decisions").glob("0*.md"))
    nav["Explanation"][-1]["Decisions"] += [f"decisions/{name}" for name in decisions]
    nav["Reference"].append({"Python": [_python_page(folder) for folder in _folders()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those in docs/."""
    for name, content in _pages():
        files.append(File.generated(config, name, content=content))
    return files


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that loads something from elsewhere."""
    found = re.search(r'<(?:script|link|img|source)[^>]+(?:src|href)="(?:https?:)?//[^"]*', output)
    if found:
        raise PluginError(f"{page.file.src_uri} loads from elsewhere: {found[0]}")
    return output


def _pages() -> Iterator[tuple[str, str]]:
    for name, source in TEXTS.items():
        yield name, _text(source)
    gem = (ROOT / "deployments/gateway/page/gem.svg").read_text()
    yield "gem.svg", gem
    yield "logo.svg", gem.replace("#1f9488", "#fff")  # on the header's own teal
    yield "site.css", STYLE
    yield "reference/configuration.md", _configuration()
    yield "reference/cli.md", _commands()
    yield "reference/grpc.md", _grpc()
    for folder in _folders():
        yield _python_page(folder), _python(folder)


def _text(source: str) -> str:
    """A text from beside docs/, with its links as they are seen from docs/."""
    text = (ROOT / source).read_text()
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # the model card's metadata
    for name, other in TEXTS.items():
        text = text.replace(f"]({other})", f"]({name})")
    return re.sub(r'(\]\(|(?:src|srcset)=")docs/', r"\1", text)


def _configuration() -> str:
    rows: dict[str, list[str]] = {}
    for setting in settings():
        section = setting.key.rpartition(".")[0]
        key, default = f"`{setting.key}`", _shown(setting.default)
        row = (key, default, _allowed(setting), setting.description)
        rows.setdefault(section, []).append(_row(row))
    lines = [
        "# Configuration",
        "",
        "Each key can stand in a YAML file (`--config FILE`) or on the command line "
        "(`--set KEY=VALUE`). An unknown key is an error. Sizes may be written as `512MiB` or "
        "`2GB`.",
    ]
    for section, table in rows.items():
        lines += ["", f"## {section or 'The whole cluster'}", ""]
        lines += [_row(("key", "default", "range", "meaning")), "|---|---|---|---|"]
        lines += table
    return "\n".join(lines)


def _shown(default: object) -> str:
    if isinstance(default, bool) or default is None:
        return f"`{str(default).lower()}`".replace("none", "null")
    if isinstance(default, Path):
        return f"`{str(default).replace(str(Path.home()), '~')}`"
    if isinstance(default, int) and default:
        for n, unit in ((30, "GiB"), (20, "MiB")):
            if default % (1 << n) == 0:
                return f"{default >> n} {unit}"
    return f"`{list(default) if isinstance(default, tuple) else default}`"


def _allowed(setting: Setting) -> str:
    least, most, unit = setting.least, setting.most, setting.unit
    if least is None:
        return unit
    return f"at least {least:,} {unit}" if most is None else f"{least:,} to {most:,} {unit}"


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _commands() -> str:
    parser = make_parser()
    lines = ["# Commands", "", f"{parser.description} Every command takes `--config` and `--set`."]
    for name, command in _subcommands(parser):
        command.formatter_class = _wide
        lines += ["", f"## briolette {name}", "", "```", command.format_help().strip(), "```"]
    return "\n".join(lines)


def _wide(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, width=96)  # whatever the terminal's width is


def _subcommands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def _grpc() -> str:
    lines = [
        "# gRPC",
        "",
        "The services of the gateway, from the files in `protos/briolette/v1/`. Health "
        "(`grpc.health.v1`) and reflection are standard, so clients such as grpcurl need no file.",
    ]
    for name in ("inference", "sessions", "admin"):
        lines += _proto((ROOT / f"protos/briolette/v1/{name}.proto").read_text())
    return "\n".join(lines)


DECLARATION = re.compile(r"(service|message|enum) (\w+) \{(\})?")
METHOD = re.compile(r"rpc (\w+)\((\w+)\) returns \((stream )?(\w+)\)")
FIELD = re.compile(r"(?:(repeated|optional) )?([\w.<>, ]*?) ?(\w+) = (\d+);")


def _proto(text: str) -> Iterator[str]:
    """Headings and tables of one file; a comment stands before its declaration or behind it."""
    comments: list[str] = []
    for line in map(str.strip, text.splitlines()):
        code, _, comment = (part.strip() for part in line.partition("//"))
        declared = DECLARATION.match(code)
        if declared:
            kind, name, _ = declared.groups()
            yield from ("", f"## {name}" if kind == "service" else f"### {name}", "")
            yield from (" ".join(comments), "")
            columns = {
                "service": ("method", "request", "response", "meaning"),
                "message": ("field", "type", "number", "meaning"),
                "enum": ("value", "", "number", "meaning"),
            }[kind]
            if not declared[3]:
                yield from (_row(columns), "|---|---|---|---|")
        elif method := METHOD.match(code):
            name, request, stream, response = method.groups()
            yield _row((f"`{name}`", request, f"{stream or ''}{response}", " ".join(comments)))
        elif field := FIELD.match(code):
            label, kind, name, number = field.groups()
            shown = f"{label or ''} {kind}".strip()
            yield _row((f"`{name}`", shown, number, " ".join([*comments, comment]).strip()))
        elif not code and comment:
            comments.append(comment)
            continue
        comments = []


def _folders() -> list[Path]:
    """The packages whose modules have a page of reference, by their path from the root."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("[a-z]*.py")]
    return sorted({path.parent.relative_to(ROOT) for path in files})


def _python_page(folder: Path) -> str:
    return f"reference/python/{'.'.join(folder.parts)}.md"


def _python(folder: Path) -> str:
    names = sorted(path.stem for path in (ROOT / folder).glob("[a-z]*.py"))
    package = ".".join(folder.parts)
    modules = "\n\n".join(
        f"::: {package}.{name}\n    options: {{heading_level: 2}}" for name in names
    )
    return f"# {package}\n\n{modules}\n"
