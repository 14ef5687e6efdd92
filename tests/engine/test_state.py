"""What an edit keeps belongs to one run: the host keeps models, and the edits in them, for the next."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterator

import pytest
import subject_patches
from host import ROOT
from subject_patches.patches.engine.edit import Edit

for _path in sorted((ROOT / "patches").rglob("*.py")):
    _parts = _path.relative_to(ROOT).with_suffix("").parts
    importlib.import_module(".".join((subject_patches.__name__, *_parts)))


def _edits(kind: type[Edit] = Edit) -> Iterator[type[Edit]]:
    for each in kind.__subclasses__():
        yield from (each, *_edits(each))


def _state(kind: type[Edit]) -> set[str]:
    """The fields of an edit that are made anew where none is given, and are not told by a node."""
    fields = dataclasses.fields(kind)
    return {each.name for each in fields if each.name.startswith("_") and callable(each.default_factory)}


def _ours(kind: type[Edit]) -> bool:
    """What runs: of a family of edits the last."""
    return kind.__module__.startswith(subject_patches.__name__) and not kind.__subclasses__() and bool(_state(kind))


EDITS = [each for each in dict.fromkeys(_edits()) if _ours(each)]


def test_some_edits_keep_something() -> None:
    assert len(EDITS) >= 4


@pytest.mark.parametrize("kind", EDITS, ids=lambda kind: kind.__name__)
def test_a_run_begins_with_nothing_kept(kind: type[Edit]) -> None:
    """`begin` makes anew what an edit keeps, so that nothing of one run, or of one beside it, is in another's."""
    begins = "".join(
        inspect.getsource(each.begin) for each in kind.__mro__ if "begin" in vars(each) and each is not Edit
    )
    assert {name for name in _state(kind) if f"{name}=" not in begins} == set()
