"""Settings in frozen dataclasses: from YAML and the command line, every key and value checked."""

from __future__ import annotations

import difflib
import logging
import math
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from cluster.errors import ConfigError

logger = logging.getLogger(__name__)

TEXTS = tuple[str, ...]  # a list in YAML
Values = dict[str, tuple[Any, str]]  # value, where it stands, by dotted key

T = TypeVar("T")


def setting(
    default: T, text: str, unit: str = "", least: float | None = None, most: float | None = None
) -> T:
    """One key: its default, what it means, its unit and its range (both ends included)."""
    metadata = {"help": text, "unit": unit, "least": least, "most": most}
    made: T = field(default=default, metadata=metadata)  # the type checker sees the default
    return made


def parse_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """`["engine.max_num_seqs=8"]` from a command line, as overrides for `Config.load`."""
    overrides = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is not of the form key=value.")
        try:
            overrides[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"The value of {key.strip()} is not valid YAML: {text!r}.") from None
    return overrides


def parse_bytes(text: str) -> int:
    """A size like "2GiB", "512 MB" or "1024" in bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGT])(i?))?B?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is not a size like 512MiB or 2GB")
    number, prefix, binary = match.groups()
    scale: int = (1024 if binary else 1000) ** (" KMGT".index(prefix.upper()) if prefix else 0)
    return round(float(number) * scale)


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Raises ConfigError."""
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}.") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path} must hold keys and values, not a {type(tree).__name__}.")
    return tree or {}


@dataclass(frozen=True, slots=True)
class Renamed:
    """The present name of a former key, and the present words for its former values."""

    key: str
    values: Mapping[str, str] = field(default_factory=dict)

    def value(self, former: Any) -> Any:
        return self.values.get(former, former) if isinstance(former, str) else former


def flatten(
    tree: Mapping[Any, Any], source: str, known: set[str], renamed: Mapping[str, Renamed]
) -> Values:
    """The leaves of a tree by dotted key, former keys under their present ones.

    Raises ConfigError for a key that isn't known, or that is given under both of its names.
    """
    values = {}
    for key, value in _known_leaves(tree, "", source, known | renamed.keys()):
        if key in renamed:
            former, new = key, renamed[key]
            key, value = new.key, new.value(value)
            logger.warning(
                "%s: %s was renamed: write %s: %s. The next version will refuse the old name.",
                source,
                former,
                key,
                value,
            )
        if key in values:
            raise ConfigError(f"{source}: {key} is given twice, once under its old name.")
        values[key] = (value, source)
    return values


def _known_leaves(
    tree: Mapping[Any, Any], prefix: str, source: str, known: set[str]
) -> Iterator[tuple[str, Any]]:
    sections = {key.rpartition(".")[0] for key in known} - {""}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in sections:
            if not isinstance(value, Mapping | None):
                raise ConfigError(f"{source}: {key} holds keys of its own, not a value.")
            yield from _known_leaves(value or {}, f"{key}.", source, known)
        elif key in known:
            yield key, value
        else:
            raise ConfigError(f"{source}: unknown key {key}{_did_you_mean(key, known | sections)}")


def _did_you_mean(key: str, known: set[str]) -> str:
    by_name = {name.rpartition(".")[2]: name for name in sorted(known)}
    near = difflib.get_close_matches(key, known, 1) or [
        by_name[name] for name in difflib.get_close_matches(key.rpartition(".")[2], by_name, 1)
    ]
    return f"; did you mean {near[0]}?" if near else "."


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(dotted key, value, metadata) of every setting, in order."""
    for item in fields(section):
        default = getattr(section, item.name)
        if is_dataclass(default):
            yield from leaves(default, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, default, item.metadata


def build(section: type[Any], values: Values, prefix: str = "") -> Any:
    """A dataclass with its sections, each value checked. Raises ConfigError."""
    hints = get_type_hints(section)
    made = {}
    for item in fields(section):
        key = prefix + item.name
        if is_dataclass(item.default):
            made[item.name] = build(type(item.default), values, f"{key}.")
        elif key in values:
            value, source = values[key]
            try:
                made[item.name] = _checked(value, hints[item.name], item.metadata)
            except ValueError as error:
                raise ConfigError(f"{source}: {key} {error}.") from None
    return section(**made)


def _checked(value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """The value as its type wants it; ValueError completes the sentence "<key> …"."""
    if get_origin(hint) in (types.UnionType, Union):
        if value is None:
            return None
        hint = next(arg for arg in get_args(hint) if arg is not types.NoneType)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"must be one of {', '.join(get_args(hint))}, not {value!r}")
        return value
    value = _converted(value, hint, metadata["unit"])
    least, most = metadata["least"], metadata["most"]
    if least is not None and value < least:
        raise ValueError(f"must be at least {least}, not {value}")
    if most is not None and value > most:
        raise ValueError(f"must be at most {most}, not {value}")
    return value


def _converted(value: Any, hint: Any, unit: str) -> Any:
    if unit == "bytes" and isinstance(value, str):
        try:
            return parse_bytes(value)
        except ValueError as error:
            raise ValueError(f"must be a size: {error}") from None
    if hint is float and isinstance(value, str):
        value = _number(value)  # YAML 1.1 reads 1e-3 as a string
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number and math.isfinite(value):
        return float(value)
    if hint is int and is_number and isinstance(value, int):
        return value
    if hint is Path and isinstance(value, str | Path) and value != "":
        return Path(value).expanduser().absolute()  # another process has another directory
    if hint in (bool, str) and isinstance(value, hint) and value != "":
        return value
    is_list = isinstance(value, list | tuple)
    if hint == TEXTS and is_list and all(isinstance(item, str) and item for item in value):
        return tuple(value)
    shown = "null" if value is None else repr(value)
    raise ValueError(f"must be {_TYPE_NAMES[hint]}, not {shown}")


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    TEXTS: "a list of texts",
}


def plain(section: Any) -> dict[str, Any]:
    """Dicts, lists, strings and numbers."""
    return {item.name: _plain(getattr(section, item.name)) for item in fields(section)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return plain(value)
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
