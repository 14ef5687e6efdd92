"""What an edit keeps belongs to one run: the host keeps models, and the edits in them, for the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from subject_patches.patches.engine.edit import Edit
from subject_patches.patches.engine.engine import KEY
from subject_patches.tests.shared.dit_models import dit_model
from subject_patches.tests.shared.left_behind import tree
from subject_patches.tests.shared.mechanisms import FLUX_MECHANISMS, MECHANISMS, Mechanism
from subject_patches.tests.shared.models import sample

EVERY = (*MECHANISMS, *FLUX_MECHANISMS)


def edits_of(value: Any) -> Iterator[Edit]:
    """The edits in a MODEL's options, and those in their fields."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from edits_of(each)
    elif isinstance(value, Edit):
        yield value
        for each in dataclasses.fields(value):
            yield from edits_of(getattr(value, each.name))


def kept(edit: Edit) -> dict[str, Any]:
    """What a run may write into: the fields of an edit that are made anew where none is given, and no node gives."""
    names = [each.name for each in dataclasses.fields(edit) if each.name.startswith("_")]
    return {name: getattr(edit, name) for name in names}


@pytest.fixture(scope="module")
def flux() -> Any:
    return dit_model("FLUX.1")


def patched(mechanism: Mechanism, request: pytest.FixtureRequest) -> Any:
    return mechanism.on(request.getfixturevalue("flux" if mechanism in FLUX_MECHANISMS else "model"))


@pytest.mark.parametrize("mechanism", EVERY, ids=lambda m: m.name)
def test_a_run_leaves_nothing_in_the_edits(mechanism: Mechanism, request: pytest.FixtureRequest) -> None:
    """`begin` makes anew what an edit keeps, and `parts` the edits that stand for it, so that nothing of one run, or of
    one beside it, is in another's."""
    model = patched(mechanism, request)
    edits = list(edits_of(model.model_options["transformer_options"][KEY]))
    before = [tree(kept(edit)) for edit in edits]
    sample(model)
    assert [tree(kept(edit)) for edit in edits] == before


def test_many_edits_keep_something(request: pytest.FixtureRequest) -> None:
    found = {
        type(edit)
        for mechanism in EVERY
        for edit in edits_of(patched(mechanism, request).model_options["transformer_options"][KEY])
        if kept(edit)
    }
    assert len(found) >= 6
