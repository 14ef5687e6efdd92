"""The workflows for real checkpoints, run with random weights of the same architecture that are small, in few steps."""

from __future__ import annotations

from typing import Any

import pytest
from host import Server
from hosting.graphs import FAMILIES
from hosting.paths import ROOT
from hosting.workflows import load_workflow, real_workflow_files, workflow_files
from real_workflows import WORKFLOWS
from soaking.workflows import small


def test_every_kind_is_there_for_every_family() -> None:
    assert {path.stem for path in real_workflow_files()} == {
        f"{kind}_{name}" for kind in WORKFLOWS for name in FAMILIES
    }
    assert not {*workflow_files()} & {*real_workflow_files()}


@pytest.mark.parametrize("family", FAMILIES)
def test_they_run(small_server: Server, family: str) -> None:
    """Each gives a picture of the size that one number says; the trained concept is loaded again by the next."""
    # Before one that loads what another trains.
    kinds = sorted(WORKFLOWS, key=list(WORKFLOWS).index)
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
