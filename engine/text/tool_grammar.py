"""A grammar for required tool calls in Gemma's form, whose arguments match the tools' schemas.

It enforces names, types, `enum`, `const`, `items`, `required`, `anyOf`, `oneOf` and `$ref` of a
JSON schema, but no limits of length or size. Arguments come in the order of their names, in which
chat templates declare them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from cluster.errors import InvalidRequest
from engine.text.chat_messages import ToolDefinition, to_object
from engine.text.dialect import Dialect
from engine.text.grammar import Grammar

BARE_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
COMMON = """\
value: string | NUMBER | "true" | "false" | "null" | object | array
object: "{" (pair ("," pair)*)? "}"
pair: KEY ":" value
array: "[" (value ("," value)*)? "]"
KEY: /[A-Za-z_][A-Za-z0-9_.-]*/
NUMBER: INTEGER /(\\.[0-9]+)?([eE][+-]?[0-9]+)?/
INTEGER: /-?(0|[1-9][0-9]*)/
TEXT: /(.|\\n)*/
"""
BY_TYPE = {
    "string": "string",
    "number": "NUMBER",
    "integer": "INTEGER",
    "boolean": '("true" | "false")',
    "null": '"null"',
}


def calls_grammar(tools: Sequence[ToolDefinition], dialect: Dialect) -> Grammar:
    """Return a Lark grammar for one or more calls, each of one of the tools.

    Raises:
        InvalidRequest: The model has no tool calls, or a schema is malformed.
    """
    if dialect.call_open is None or dialect.call_close is None or dialect.quote is None:
        raise InvalidRequest("This model has no tokens for tool calls.")
    quote = f"<[{dialect.quote}]>"
    rules = [f"string: {quote} TEXT {quote}", COMMON]
    calls: list[str] = []
    for tool in tools:
        where = f"The parameters of the tool {tool['name']!r}"
        schema = to_object(tool.get("parameters") or {}, where)
        try:
            tool_rules = _ToolRules(
                schema, prefix=f"tool{len(calls)}", quote=quote, rules=rules, where=where
            )
            arguments = tool_rules.add_object(schema)
        except RecursionError:
            raise InvalidRequest(f"{where} are nested too deeply.") from None
        calls.append(f"{_literal('call:' + tool['name'])} {arguments}")
    start = f"start: call+\ncall: <[{dialect.call_open}]> ({' | '.join(calls)})"
    return Grammar("lark", "\n".join([f"{start} <[{dialect.call_close}]>", *rules]))


class _ToolRules:
    """Turns the schema of one tool's parameters into grammar rules."""

    def __init__(
        self, root: Mapping[str, Any], *, prefix: str, quote: str, rules: list[str], where: str
    ) -> None:
        """Prepare to add to `rules`.

        Args:
            root: The whole schema, for references into it.
            prefix: Begins the names of these rules.
            quote: The quote token in Lark's form.
            rules: The grammar's rules so far.
            where: Begins error messages; a plural noun.
        """
        self._root, self._prefix, self._quote = root, prefix, quote
        self._rules, self._where = rules, where
        self._num_rules = 0
        self._references: dict[str, str] = {}  # the rule's name by JSON pointer

    def add_object(self, schema: Mapping[str, Any]) -> str:
        """Add a rule for an object; returns its name."""
        properties = schema.get("properties") or {}
        required = schema.get("required") or []
        is_list = isinstance(required, list) and all(isinstance(key, str) for key in required)
        if not isinstance(properties, Mapping) or not is_list:
            raise InvalidRequest(f"{self._where} are not a JSON schema.")
        more = schema.get("additionalProperties", not properties)
        properties = {**{key: {} for key in required}, **properties}
        tail = '("," pair)*' if more else ""
        firsts = [f"pair {tail}"] if more else []
        is_optional = True
        for key in sorted(properties, key=str.lower, reverse=True):
            pair = f"{self._key(key)} {self._expression(properties[key])}"
            first = self._add(f"{pair} {tail}")
            if key in required:
                firsts, is_optional = [first], False
                tail = f'"," {first}'
            else:
                firsts.append(first)
                tail = self._add(f'("," {pair})? {tail}')
        members = f"({' | '.join(firsts)}){'?' if is_optional else ''}" if firsts else ""
        return self._add(f'"{{" {members} "}}"')

    def _expression(self, schema: Any) -> str:
        """A Lark expression for a value that matches the schema."""
        if not isinstance(schema, Mapping):
            return "value"
        if "$ref" in schema:
            return self._reference(str(schema["$ref"]))
        if "const" in schema:
            return self._constant(schema["const"])
        if isinstance(schema.get("enum"), list) and schema["enum"]:
            return self._any(map(self._constant, schema["enum"]))
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list) and schema[key]:
                return self._any(map(self._expression, schema[key]))
        implied = "object" if "properties" in schema else "array" if "items" in schema else None
        types = schema.get("type", implied)
        names = types if isinstance(types, list) and types else [types]
        if schema.get("nullable"):
            names = [*names, "null"]
        # Each name once: nested lists of repeated names would multiply the rules
        once = [name for i, name in enumerate(names) if name not in names[:i]]
        return self._any(self._of_type(name, schema) for name in once)

    def _of_type(self, name: Any, schema: Mapping[str, Any]) -> str:
        if name == "object":
            return self.add_object(schema)
        if name == "array":
            item = self._expression(schema.get("items"))
            return self._add(f'"[" ({item} ("," {item})*)? "]"')
        return BY_TYPE.get(name, "value") if isinstance(name, str) else "value"

    def _reference(self, reference: str) -> str:
        if reference not in self._references:
            target: Any = self._root
            for step in unquote(reference.removeprefix("#")).split("/")[1:]:
                target = _member(target, step.replace("~1", "/").replace("~0", "~"))
            if not reference.startswith("#") or not isinstance(target, Mapping):
                raise InvalidRequest(f"{self._where} refer to {reference!r}, which does not exist.")
            rule = self._references[reference] = self._new_name()
            self._rules.append(f"{rule}: {self._expression(target)}")
        return self._references[reference]

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self._quote} {_literal(value)} {self._quote}" if value else self._empty()
        if isinstance(value, list | dict):
            return "value"
        return _literal(json.dumps(value))

    def _empty(self) -> str:
        return f"{self._quote} {self._quote}"

    def _key(self, key: str) -> str:
        if BARE_KEY.fullmatch(key):
            return _literal(f"{key}:")
        return f'{self._constant(key)} ":"'

    def _any(self, expressions: Any) -> str:
        return f"({' | '.join(dict.fromkeys(expressions))})"

    def _add(self, expression: str) -> str:
        rule = self._new_name()
        self._rules.append(f"{rule}: {expression}")
        return rule

    def _new_name(self) -> str:
        self._num_rules += 1
        return f"{self._prefix}_{self._num_rules}"


def _member(target: Any, name: str) -> Any:
    """The member that one step of a JSON pointer (RFC 6901) leads to; None if there is none."""
    if isinstance(target, Mapping):
        return target.get(name)
    is_there = isinstance(target, list) and name.isdecimal() and int(name) < len(target)
    return target[int(name)] if is_there else None


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
