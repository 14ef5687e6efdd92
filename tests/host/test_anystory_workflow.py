"""The workflow of AnyStory, over the queue of a stock server. The host's loaders load a small FLUX and a small VAE, and
the pack's AnyStory's weights for it, under the names that the workflow gives them. Loaders of small models stand for
those of the host's whose files have to be of the released sizes: the text encoders', SigLIP's and Redux's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host import ROOT, Server
from hosting.client import ApiPrompt
from hosting.errors import WorkflowError
from hosting.workflows import find_workflow, load_workflow
from soaking.workflows import PIXELS, small_workflows

from ..shared.queued import pictures
from ..shared.small_flux import write_anystory

# Its subjects' tokens act from a tenth of the steps on, its references from the first but one.
STEPS = 5
TOY = "subject-patches-toy.safetensors"


@pytest.fixture(scope="module")
def workflow(flux_server: Server) -> ApiPrompt:
    """The file as the page queues it, but for sizes, steps and three loaders."""
    return small_workflows(flux_server, ["anystory_flux"], steps=STEPS)["anystory_flux"]


@pytest.fixture
def api(workflow: ApiPrompt) -> ApiPrompt:
    return copy.deepcopy(workflow)


def _of(api: ApiPrompt, kind: str) -> list[tuple[str, dict[str, Any]]]:
    return [(number, node["inputs"]) for number, node in api.items() if node["class_type"] == kind]


def _both(server: Server, api: ApiPrompt) -> tuple[Any, Any]:
    """The picture with subjects, and the one without."""
    shown = {api[number]["_meta"]["title"]: each for number, each in pictures(server, api).items()}
    return shown["With both subjects"], shown["Without AnyStory"]


def test_it_runs_over_the_queue(flux_server: Server, api: ApiPrompt) -> None:
    """Both pictures come, the one with subjects another than the one without. With the features that the subjects keep
    comes the same picture, and with nothing to do the one without, bit for bit."""
    shown, without = _both(flux_server, api)
    assert shown.shape == without.shape == (PIXELS, PIXELS, 3)
    assert np.abs(shown - without).max() > 3
    ((_, patch),) = _of(api, "SubjectPatchesAnyStory")
    before = dict(patch)
    patch |= {"token_scale": 0.0, "reference_start": 1.0}
    unchanged, again = _both(flux_server, api)
    assert np.array_equal(unchanged, without)
    assert np.array_equal(again, without)
    patch |= before
    assert np.array_equal(_both(flux_server, api)[0], shown)


def test_router_and_references_act(flux_server: Server, api: ApiPrompt) -> None:
    shown, _ = _both(flux_server, api)
    ((_, patch),) = _of(api, "SubjectPatchesAnyStory")
    for change in ({"router": "off"}, {"reference_start": 1.0}, {"token_scale": 0.0}):
        before = dict(patch)
        patch |= change
        assert np.abs(_both(flux_server, api)[0] - shown).max() > 1, change
        patch |= before


def _refused(server: Server, api: ApiPrompt, sentence: str) -> None:
    with pytest.raises(WorkflowError, match=sentence):
        server.queue(api)


def test_bad_input_is_one_sentence(flux_server: Server, api: ApiPrompt) -> None:
    """Another family, nine subjects, an empty mask, no Redux, weights of another FLUX and of two ranks."""
    ((number, _),) = _of(api, "SubjectPatchesAnyStory")
    (_, (last, _)) = _of(api, "SubjectPatchesAnyStorySubject")
    changed = copy.deepcopy(api)
    changed["toy"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": TOY}}
    changed[number]["inputs"]["model"] = ["toy", 0]
    _refused(flux_server, changed, r"weights are for FLUX\.1, but this model is of")

    changed, before = copy.deepcopy(api), last
    for extra in range(7):
        added = copy.deepcopy(api[last])
        added["inputs"]["others"] = [before, 0]
        before = f"extra {extra}"
        changed[before] = added
    changed[number]["inputs"]["subjects"] = [before, 0]
    _refused(flux_server, changed, "shows one to 8 subjects, but there are 9; leave some out")

    changed = copy.deepcopy(api)
    changed["black"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 64, "height": 64}}
    changed[last]["inputs"]["mask"] = ["black", 0]
    _refused(flux_server, changed, "mask is empty.* Paint the subject white, or invert the mask")

    changed = copy.deepcopy(api)
    ((_, style),) = _of(changed, "SmallStyle")
    style["kind"] = "adapter"
    _refused(flux_server, changed, r"style model is not FLUX\.1 Redux")

    # A rank is a file's own; where its two halves are of two, or it is for another FLUX, it is told.
    models = flux_server.base / "models"
    for name, sizes, sentence in (
        ("other_rank", {"reference_rank": 2, "map_rank": 3}, None),
        ("other_flux", {"single": 3}, "are for a FLUX of 1 and 3 blocks, 256 wide"),
    ):
        write_anystory(models, name, **sizes)
        changed = copy.deepcopy(api)
        ((_, loader),) = _of(changed, "SubjectPatchesLoadAnyStory")
        loader["file"] = f"{name}.safetensors"
        if sentence is None:
            assert len(pictures(flux_server, changed)) == 2
        else:
            _refused(flux_server, changed, sentence)


def test_the_files_it_needs_are_told() -> None:
    """README's and the help page's words name each of them."""
    told = (ROOT / "web" / "docs" / "SubjectPatchesLoadAnyStory.md").read_text(encoding="utf-8")
    workflow = load_workflow(find_workflow("anystory_flux"))
    values = [value for node in workflow["nodes"] for value in node.get("widgets_values") or ()]
    files = [Path(value).stem for value in values if isinstance(value, str) and value.endswith(".safetensors")]
    assert len(files) == 7
    assert [name for name in files if name not in told] == []
