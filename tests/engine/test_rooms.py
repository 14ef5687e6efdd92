"""What imports what: of the pack's folders, and of the rooms of patches/, each from itself and from those before it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import ROOT

ROOMS = ("parts", "families", "engine", "mechanisms", "anystory", "pictures")
PATCHES = ROOT / "patches"
# The toys and the tools know the pack, and it none of them.
FOLDERS = ("patches", "encoders", "training", "nodes")
# What trainings take by themselves depends on the family, of which the toy is one.
KNOWS_THE_TOY = "training/usual.py"


def _imports(path: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    """Where a file's relative imports lead from the root, also those within functions, and where they stand; those for
    types alone left out."""
    package = path.parent.relative_to(ROOT).parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    of_types = [
        each for each in ast.walk(tree) if isinstance(each, ast.If) and ast.unparse(each.test) == "TYPE_CHECKING"
    ]
    left_out = {id(node) for each in of_types for node in ast.walk(each)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in left_out:
            named = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            yield named, f"{path.relative_to(ROOT)}, line {node.lineno}"


def test_every_file_is_in_a_room() -> None:
    assert [path.name for path in PATCHES.glob("*.py")] == ["__init__.py"]
    assert {path.parent.name for path in PATCHES.glob("*/*.py")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    allowed = ROOMS[: ROOMS.index(room) + 1]
    for path in (PATCHES / room).rglob("*.py"):
        for named, place in _imports(path):
            assert named[0] == "patches", place
            assert named[1] in allowed, place


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_one_way_too(folder: str) -> None:
    allowed = FOLDERS[: FOLDERS.index(folder) + 1]
    for path in (ROOT / folder).rglob("*.py"):
        for named, place in _imports(path):
            assert named[0] in allowed or place.startswith(KNOWS_THE_TOY), place


def test_the_design_names_every_file() -> None:
    """And no other, under the rooms whose files it lists; a family's is named after it."""
    text = (ROOT / "docs" / "DESIGN.md").read_text(encoding="utf-8")
    _, *parts = re.split(r"^ {0,2}(\w+)/ ", text, flags=re.MULTILINE)
    listed = dict(zip(parts[::2], parts[1::2], strict=True))
    for folder in (*(PATCHES / room for room in ROOMS if room != "families"), ROOT / "encoders"):
        # What is quoted is no part of a list.
        named = set(re.findall(r"\w+\.py", re.sub(r"`[^`]*`", "", listed[folder.name])))
        assert named == {path.name for path in folder.glob("*.py")} - {"__init__.py"}, folder.name


def test_no_test_imports_another() -> None:
    """What several share is in tests/shared."""
    found = []
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                named = (*(node.module or "").split("."), *(each.name for each in node.names))
                found += [f"{path.name}: {name}" for name in named if name.startswith("test_")]
    assert found == []
