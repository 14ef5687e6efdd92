"""The workflows for a distilled model, Z-Image Turbo, over the queue of a stock server: at CFG 1 in few steps, with
small models of the host's own classes. The host's loader loads the VAE; those of a Z-Image and of its Qwen know only
their own widths, so loaders of the test's stand for them.

UNETLoader knows a Z-Image by its 3840 channels (`ZImage` in comfy/supported_models.py, "Z image" in
comfy/model_detection.py): with the four refining blocks that it always has, one layer makes a file of 1.8 GB.
CLIPLoader knows a Qwen3 4B by a norm of 2560 numbers (`detect_te_model` in comfy/sd.py) and makes it by
`Qwen3_4BConfig` (comfy/text_encoders/llama.py), 36 layers whatever the file holds: 4 billion numbers, 8 GB in half
precision. Nothing that the loader gives goes over that."""

from __future__ import annotations

import json

import numpy as np
import pytest
from host import Server
from hosting.client import ApiPrompt
from hosting.errors import WorkflowError
from hosting.graphs import DISTILLED
from hosting.recipes import WORKFLOWS
from hosting.workflows import find_workflow, load_workflow
from soaking.workflows import PIXELS, small

from ..shared.queued import picture, pictures

NAMES = [f"{kind}_zimage" for kind, (_, families) in WORKFLOWS.items() if "zimage" in families]


@pytest.fixture(scope="module")
def workflows(flux_server: Server) -> dict[str, ApiPrompt]:
    """Each file as the page queues it. FLUX.1's VAE is theirs, too."""
    prompts = flux_server.to_api_each([load_workflow(find_workflow(name)) for name in NAMES])
    return dict(zip(NAMES, prompts, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_at_cfg_1(flux_server: Server, workflows: dict[str, ApiPrompt], name: str) -> None:
    """What the nodes do is seen, and without it the picture is another; the files and the size stand in one place."""
    api = workflows[name]
    values = [value for node in api.values() for value in node["inputs"].values() if not isinstance(value, list)]
    assert [value for value in values if str(value).endswith(".safetensors")] == [
        "z_image_turbo_bf16.safetensors", "qwen_3_4b.safetensors", "ae.safetensors",
    ]  # fmt: skip
    samplers = [node["inputs"] for node in api.values() if node["class_type"] == "KSampler"]
    assert {(each["cfg"], each["steps"]) for each in samplers} == {(1.0, 8)}
    assert values.count(DISTILLED["zimage"].side) == (2 if name == "reference_zimage" else 1)
    api = small(name, api)
    shown = pictures(flux_server, api)
    assert {each.shape for each in shown.values()} == {(PIXELS, PIXELS, 3)}
    for node in api.values():
        off = {"strength": 0.0, "guidance_weight": 0.0}
        node["inputs"] |= {key: value for key, value in off.items() if key in node["inputs"]}
    without = pictures(flux_server, api)
    changed = [number for number in shown if np.abs(shown[number] - without[number]).max() > 0]
    # The layout's comparison, the prompt alone, stays.
    titles = [api[number]["_meta"]["title"] for number in changed]
    assert titles == [{"layout_zimage": "After: each in its box"}.get(name, "The picture")]


def test_each_box_has_its_phrase(flux_server: Server, workflows: dict[str, ApiPrompt]) -> None:
    """Found in Qwen's tokens: other boxes give another picture, and of a word that Qwen takes for one the half is
    refused by name."""
    api = small("two_subjects_zimage", workflows["two_subjects_zimage"])
    before = picture(flux_server, api)
    (numbers,) = (node["inputs"] for node in api.values() if node["class_type"] == "PrimitiveStringMultiline")
    boxes = json.loads(numbers["value"])
    boxes[0]["y"] = 0
    numbers["value"] = json.dumps(boxes)
    assert not np.array_equal(picture(flux_server, api), before)
    (prompt,) = (node["inputs"] for node in api.values() if node["class_type"] == "SubjectPatchesEncodePrompt")
    prompt |= {"text": "一只可爱的狗狗, a cat", "phrases": "狗"}
    with pytest.raises(WorkflowError, match="'狗' is only a part of the token '狗狗' of the text encoder qwen3_4b"):
        flux_server.queue(api)
