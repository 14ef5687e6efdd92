"""What a server publishes of its nodes (its object_info, `known`), asked of one node by its kind."""

from __future__ import annotations

from typing import Any

# How the names of the pack's nodes begin.
PACK = "SubjectPatches"


def inputs_of(known: dict[str, Any], kind: str) -> dict[str, tuple[Any, dict[str, Any], bool]]:
    """Of a node's inputs the type, options, and whether it has to be given."""
    found = {}
    for category in ("required", "optional"):
        for name, (type_, *more) in known[kind]["input"].get(category, {}).items():
            found[name] = (type_, more[0] if more else {}, category == "required")
    return found


def types_of(known: dict[str, Any], kind: str) -> set[str]:
    """All that it takes and gives."""
    taken = {part for type_, *_ in inputs_of(known, kind).values() for part in str(type_).split(",")}
    return taken | set(known[kind]["output"])


def gives(known: dict[str, Any], kind: str, type_: str) -> bool:
    return type_ in known[kind]["output"]


def takes(known: dict[str, Any], kind: str, type_: str) -> bool:
    return any(type_ in str(given).split(",") for given, *_ in inputs_of(known, kind).values())
