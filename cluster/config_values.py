"""What settings are made of: value types with units, YAML trees, and a sentence per mistake."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from cluster.errors import ConfigError

logger = logging.getLogger(__name__)


class Section(BaseModel):
    """Settings that belong together; unknown keys and values of another type are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        str_min_length=1,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, values: Any) -> Any:
        return {} if values is None else values  # a YAML section without keys


@dataclass(frozen=True, slots=True)
class Unit:
    """What a number counts; stands in the annotation of a setting."""

    name: str


@dataclass(frozen=True, slots=True)
class Setting:
    """One key as help texts and the documentation show it; both ends belong to the range."""

    key: str  # dotted
    default: Any
    description: str
    unit: str
    least: float | None
    most: float | None


@dataclass(frozen=True, slots=True)
class Renamed:
    """The present name of a former key, and the present words for its former values."""

    key: str
    values: Mapping[str, str] = field(default_factory=dict)

    def value(self, former: Any) -> Any:
        return self.values.get(former, former) if isinstance(former, str) else former


def settings_of(section: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    """Every setting of a section and of the sections in it, in order."""
    for name, info in section.model_fields.items():
        if isinstance(info.default, Section):
            yield from settings_of(type(info.default), f"{prefix}{name}.")
        else:
            yield Setting(
                key=prefix + name,
                default=info.default,
                description=" ".join((info.description or "").split()),
                unit=_unit_of(info),
                least=_bound(info, "ge"),
                most=_bound(info, "le"),
            )


def _bound(info: FieldInfo, end: str) -> float | None:
    return next((getattr(part, end) for part in info.metadata if hasattr(part, end)), None)


def _unit_of(info: FieldInfo) -> str:
    parts = [*info.metadata]
    for member in get_args(info.annotation):  # `Seconds | None`
        parts += getattr(member, "__metadata__", ())
    return next((part.name for part in parts if isinstance(part, Unit)), "")


# -- Values


def parse_bytes(text: str) -> int:
    """Convert a size like "2GiB", "512 MB" or "1024" to bytes; ValueError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGT])(i?))?B?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is not a size like 512MiB or 2GB")
    number, prefix, binary = match.groups()
    scale: int = (1024 if binary else 1000) ** (" KMGT".index(prefix.upper()) if prefix else 0)
    return round(float(number) * scale)


def _to_bytes(value: Any) -> Any:
    return parse_bytes(value) if isinstance(value, str) else value


def _to_float(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value  # YAML 1.1 reads 1e-3 as a string
    except ValueError:
        return value


def _to_path(value: Any) -> Any:
    if value == "":
        raise PydanticCustomError("path_type", "empty")
    if isinstance(value, str | Path):
        return Path(value).expanduser().absolute()  # another process has another directory
    return value


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Bytes = Annotated[int, Unit("bytes"), BeforeValidator(_to_bytes)]
Seconds = Annotated[float, Unit("s"), BeforeValidator(_to_float)]
AbsolutePath = Annotated[Path, BeforeValidator(_to_path)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_to_tuple)]  # a list in YAML
Tokens = Annotated[int, Unit("tokens")]
Blocks = Annotated[int, Unit("blocks")]
Requests = Annotated[int, Unit("requests")]
Threads = Annotated[int, Unit("threads")]


# -- Sources


def parse_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """Parse `["engine.max_num_seqs=8"]` from a command line, as overrides for `Config.load`."""
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


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Read a file of keys and values. Raises ConfigError."""
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}.") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path} must hold keys and values, not a {type(tree).__name__}.")
    return tree or {}


def read_section(
    section: type[BaseModel], given: Mapping[Any, Any], source: str, renamed: Mapping[str, Renamed]
) -> dict[str, Any]:
    """Check what one source gives, under present keys, nested, and with its types.

    Args:
        section: the settings that there are.
        given: nested or by dotted key.
        source: what an error or a warning names, such as the file's path.
        renamed: present keys by former dotted key.

    Raises ConfigError.
    """
    tree: dict[str, Any] = {}
    for key, value in _leaves(given):
        if key in renamed:
            key, value = _present(key, value, source, renamed[key])
        _put(tree, key, value, source)
    try:
        checked = section.model_validate(tree)
    except ValidationError as invalid:
        known = {setting.key for setting in settings_of(section)}
        raise ConfigError(f"{source}: {_sentence(invalid.errors()[0], known)}") from None
    return checked.model_dump(exclude_unset=True)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested values; where both have a key, `above` wins."""
    merged = dict(below)
    for key, value in above.items():
        is_section = isinstance(value, Mapping)
        merged[key] = merge(below.get(key, {}), value) if is_section else value
    return merged


def _leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _present(former: str, value: Any, source: str, renamed: Renamed) -> tuple[str, Any]:
    key, value = renamed.key, renamed.value(value)
    logger.warning(
        "%s: %s was renamed: write %s: %s. The next version will refuse the old name.",
        source,
        former,
        key,
        value,
    )
    return key, value


def _put(tree: dict[str, Any], key: str, value: Any, source: str) -> None:
    *sections, name = key.split(".")
    for depth, section in enumerate(sections, 1):
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{source}: {'.'.join(sections[:depth])} {NOT_A_VALUE}.")
    if name in tree:
        raise ConfigError(f"{source}: {key} is given twice.")
    tree[name] = value


# -- Sentences

NOT_A_VALUE = "holds keys of its own, not a value"
WANTED = {  # by the type of pydantic's error
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "string_too_short": "a text",
    "string_unicode": "a text",
    "path_type": "a path",
    "is_instance_of": "a path",
    "tuple_type": "a list of texts",
}


def _sentence(error: ErrorDetails, known: Collection[str]) -> str:
    names = [part for part in error["loc"] if isinstance(part, str)]
    key, value, about = ".".join(names), error["input"], error.get("ctx", {})
    shown = "null" if value is None else repr(value)
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key {key}{_did_you_mean(key, known)}"
        case "model_type":
            return f"{key} {NOT_A_VALUE}."
        case "literal_error":
            choices = about["expected"].replace("'", "").replace(" or ", ", ")
            return f"{key} must be one of {choices}, not {shown}."
        case "greater_than_equal":
            return f"{key} must be at least {about['ge']}, not {shown}."
        case "less_than_equal":
            return f"{key} must be at most {about['le']}, not {shown}."
        case "value_error":
            return f"{key} must be a size: {about['error']}."
        case wanted:
            is_item = len(names) < len(error["loc"])
            return f"{key} must be {'a list of texts' if is_item else WANTED[wanted]}, not {shown}."


def _did_you_mean(key: str, known: Collection[str]) -> str:
    known = {*known, *(key.rpartition(".")[0] for key in known)} - {""}
    by_name = {name.rpartition(".")[2]: name for name in sorted(known)}
    near = difflib.get_close_matches(key, known, 1) or [
        by_name[name] for name in difflib.get_close_matches(key.rpartition(".")[2], by_name, 1)
    ]
    return f"; did you mean {near[0]}?" if near else "."
