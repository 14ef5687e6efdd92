"""The workflows for real checkpoints, run with random weights of the same architecture that are small, in few steps."""

from __future__ import annotations

from typing import Any

import pytest
from host import Server
from hosting.graphs import DISTILLED, FAMILIES, FLUX
from hosting.paths import ROOT
from hosting.recipes import WORKFLOWS
from hosting.workflows import FOLDER, load_workflow, real_workflow_files, workflow_files
from soaking.workflows import small


def test_every_kind_is_there_for_its_families() -> None:
    """And no file named after a family is there that is not made as the others are."""
    made = {f"{kind}_{name}" for kind, (_, families) in WORKFLOWS.items() for name in families}
    named = tuple(f"_{name}" for name in FAMILIES | FLUX | DISTILLED)
    assert {path.stem for path in FOLDER.glob("*.json") if path.stem.endswith(named)} == made
    assert not {*workflow_files()} & {*real_workflow_files()}


@pytest.mark.parametrize("family", FAMILIES)
def test_they_run(small_server: Server, family: str) -> None:
    """Each gives a picture of the size that one number says; the trained concept is loaded again by the next."""
    # Before one that loads what another trains.
    kinds = [kind for kind, (_, families) in WORKFLOWS.items() if family in families]
    workflows = [load_workflow(ROOT / "workflows" / f"{kind}_{family}.json") for kind in kinds]
    known = FAMILIES[family]
    for kind, prompt in zip(kinds, small_server.to_api_each(workflows), strict=True):
        loaders = [node for node in prompt.values() if node["class_type"] == "CheckpointLoaderSimple"]
        assert [node["inputs"]["ckpt_name"] for node in loaders] == [known.checkpoint]
        every = [value for node in prompt.values() for value in node["inputs"].values()]
        assert sum(value == known.side for value in every) == _places(prompt, known.side)
        outputs = small_server.queue(small(f"{kind}_{family}", prompt), seconds=300)
        assert any(entry.get("images") for entry in outputs.values()), kind


def _places(prompt: dict[str, Any], side: int) -> int:
    """How often a side may stand in a prompt: as the one number or the latent's two sides, and where it is no side of
    the picture: the canvas of boxes, and 512 of a reference."""
    assert sum(node["inputs"].get("value") == side for node in prompt.values()) <= 1
    kinds = {"PrimitiveInt", "EmptyLatentImage", "SubjectPatchesSubject", "CreateBoundingBoxes", "SubjectPatchesLayout"}
    values = (node["inputs"].values() for node in prompt.values() if node["class_type"] in kinds)
    return sum(value == side for each in values for value in each)
