"""What workflows for transformers need to run small over the queue of a test's server."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from host import Server
from hosting.client import ApiPrompt
from PIL import Image

PIXELS, STEPS = 128, 2


def replaced(api: ApiPrompt, loaders: Mapping[str, tuple[str, dict[str, Any]]]) -> ApiPrompt:
    """A workflow with some of the host's loaders replaced, by the test's of a name and inputs."""
    for node in api.values():
        kind, inputs = loaders.get(node["class_type"], (node["class_type"], node["inputs"]))
        node["class_type"], node["inputs"] = kind, dict(inputs)
    return api


def shrunk(api: ApiPrompt, **more: int) -> ApiPrompt:
    """A workflow for few steps of a small picture, and of small references; `more` are other inputs by name."""
    small = {"width": PIXELS, "height": PIXELS, "size": 64, "steps": STEPS, **more}
    for node in api.values():
        if node["class_type"] == "PrimitiveInt":
            node["inputs"]["value"] = PIXELS
        if node["class_type"] in _CANVAS:
            continue
        sizes = {name: value for name, value in small.items() if isinstance(node["inputs"].get(name), int)}
        node["inputs"] |= sizes
    return api


# What they call width and height is what boxes are numbers of.
_CANVAS = ("CreateBoundingBoxes", "SubjectPatchesLayout")


def pictures(server: Server, api: ApiPrompt) -> dict[str, Any]:
    """The one picture (height, width, 3) that each saving node of a workflow gives, by its node's number."""
    outputs = server.queue(api)
    return {number: shown(server, *entry["images"]) for number, entry in outputs.items() if entry.get("images")}


def picture(server: Server, api: ApiPrompt) -> Any:
    """The one picture that a workflow saves."""
    (shown,) = pictures(server, api).values()
    return shown


def shown(server: Server, image: dict[str, str]) -> Any:
    """A picture (height, width, 3) of 0 to 255 that a node of a run gave."""
    with Image.open(io.BytesIO(server.fetch(image))) as opened:
        return np.asarray(opened.convert("RGB")).astype(float)
