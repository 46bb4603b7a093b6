"""The tree of errors: it is drawn as it is, and every class has a kind and a gRPC status."""

from __future__ import annotations

import re

import grpc

from cluster import errors
from cluster.errors import BrioletteError, InvalidRequest


def drawn_tree() -> dict[str, tuple[int, str]]:
    """Depth and status of each class that the module's docstring draws; inherits an absent one."""
    drawn: dict[str, tuple[int, str]] = {}
    at_depth: dict[int, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        if found := re.fullmatch(r"    ([│├└─ ]*)(\w+)(?: +([A-Z_]+).*)?", line):
            depth, status = len(found[1]) // 4, found[3]
            at_depth[depth] = drawn_status = status or at_depth[depth - 1]
            drawn[found[2]] = (depth, drawn_status)
    return drawn


def real_tree(cls: type[BrioletteError], depth: int = 0) -> dict[str, tuple[int, str]]:
    tree = {cls.__name__: (depth, cls.status)}
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            tree |= real_tree(child, depth + 1)
    return tree


def test_the_tree_is_drawn_as_it_is() -> None:
    assert drawn_tree() == real_tree(BrioletteError)


def test_every_class_is_found_by_its_kind_and_has_a_grpc_status() -> None:
    assert errors.QuotaExceeded.kind == "quota_exceeded"
    assert BrioletteError.by_kind["context_too_long"] is errors.ContextTooLong
    for name, (_, status) in real_tree(BrioletteError).items():
        assert status in grpc.StatusCode.__members__, name
        assert name == "BrioletteError" or BrioletteError.by_kind[getattr(errors, name).kind]


def test_a_sentence_is_cut_where_grpc_would_drop_it() -> None:
    assert InvalidRequest("short").sentence == "short"
    assert len(InvalidRequest("x" * 9000).sentence) == errors.MAX_SENTENCE
