"""The table that the promises are tested over has every node that patches a MODEL."""

from __future__ import annotations

from typing import Any

from subject_patches.patches.engine.engine import KEY
from subject_patches.tests.shared.dit_models import dit_model
from subject_patches.tests.shared.mechanisms import FLUX_MECHANISMS, MECHANISMS
from subject_patches.tests.shared.schemas import SCHEMAS

# The one amends nothing, and what promises it keeps is in tests/pictures/test_attention_record.py; the other gives a
# model with other weights.
OTHERWISE = {"Record Attention", "Train ICO Concept"}


def nodes_of(model: Any) -> set[str]:
    """The nodes whose edits a MODEL has, without what they say of their parts; what only routes is of none."""
    edits = (edit.begin() for edit in model.model_options["transformer_options"][KEY])
    names = {part.node.partition(" (")[0] for edit in edits for part in edit.parts()}
    return names - {""}


def test_every_node_that_patches_a_model_is_tested(model: Any) -> None:
    def types(parts: Any) -> set[str]:
        return {kind for each in parts for kind in each.get_io_type().split(",")}

    patching = {each.display_name for each in SCHEMAS if "MODEL" in types(each.inputs) & types(each.outputs)}
    flux = dit_model("FLUX.1")
    pairs = [(model, each) for each in MECHANISMS] + [(flux, each) for each in FLUX_MECHANISMS]
    assert set().union(*(nodes_of(each.on(given)) for given, each in pairs)) == patching - OTHERWISE
