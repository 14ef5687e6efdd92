"""The rooms of patches/: each imports from itself and from those before it."""

from __future__ import annotations

import ast

import pytest
from host import ROOT

ROOMS = ("parts", "families", "engine", "mechanisms", "anystory", "pictures")
PATCHES = ROOT / "patches"


def test_every_file_is_in_a_room() -> None:
    assert [path.name for path in PATCHES.glob("*.py")] == ["__init__.py"]
    assert {path.parent.name for path in PATCHES.glob("*/*.py")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    """Also those within functions. `encoders` is no room: what patches/ needs of it is its modules alone."""
    allowed = ROOMS[: ROOMS.index(room) + 1]
    for path in sorted((PATCHES / room).rglob("*.py")):
        package = path.parent.relative_to(ROOT).parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            named = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            if named[0] == "patches":
                assert named[1] in allowed, f"{path.relative_to(ROOT)}, line {node.lineno}"
            else:
                assert named[0] == "encoders", f"{path.relative_to(ROOT)}, line {node.lineno}"
