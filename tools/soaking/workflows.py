"""Every workflow that the pack ships, made small: few steps of small pictures by small models."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from hosting.client import ApiPrompt
from hosting.server import Server
from hosting.workflows import FOLDER, load_workflow

# The side of pictures for real models is this or more, and becomes that; the toys' pictures are as small already.
_SIDE, PIXELS = 512, 128
# What they call width and height is what boxes are numbers of.
_CANVAS = ("CreateBoundingBoxes", "SubjectPatchesLayout")
_SIDES = ("width", "height", "value")
_FEW = {"steps": 2, "size": 64, "batch_size": 1}
# What stands for the host's loaders, by how a workflow's name ends.
_LOADERS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "sd15": {"CheckpointLoaderSimple": ("SmallCheckpoint", {"family": "sd15"})},
    "sdxl": {"CheckpointLoaderSimple": ("SmallCheckpoint", {"family": "sdxl"})},
    "flux": {
        "DualCLIPLoader": ("SmallClip", {"family": "FLUX.1"}),
        "CLIPVisionLoader": ("SmallVision", {}),
        "StyleModelLoader": ("SmallStyle", {"kind": "redux"}),
    },
    "zimage": {
        "UNETLoader": ("SmallModel", {"family": "Z-Image"}),
        "CLIPLoader": ("SmallClip", {"family": "Z-Image"}),
    },
}


def small_workflows(server: Server, names: Collection[str] | None = None, **few: int) -> dict[str, ApiPrompt]:
    """Each by its name, in an order in which what one trains is there when another loads it; only those of `names`
    where some are given. `few` is as for `small`."""
    files = [path for path in sorted(FOLDER.glob("*.json")) if names is None or path.stem in names]
    prompts = server.to_api_each([load_workflow(path) for path in files])
    return {path.stem: small(path.stem, prompt, **few) for path, prompt in zip(files, prompts, strict=True)}


def small(name: str, prompt: ApiPrompt, **few: int) -> ApiPrompt:
    """The workflow of a name with the loaders of small models, small sides, and few steps; `few` are other numbers of
    inputs by their names."""
    loaders, few, made = _LOADERS.get(name.rsplit("_", 1)[-1], {}), {**_FEW, **few}, {}
    for number, node in prompt.items():
        kind, inputs = loaders.get(node["class_type"], (node["class_type"], node["inputs"]))
        changed = {
            given: few.get(given, PIXELS)
            for given, value in inputs.items()
            if type(value) is int and (given in few or (given in _SIDES and value >= _SIDE and kind not in _CANVAS))
        }
        made[number] = {**node, "class_type": kind, "inputs": {**inputs, **changed}}
    return made


def again(prompt: ApiPrompt, number: int) -> ApiPrompt:
    """The same workflow, with nothing that the host's cache has of another number: every latent that a sampler begins
    with goes through a node that tells the number."""
    changed = {name: {**node, "inputs": dict(node["inputs"])} for name, node in prompt.items()}
    for name, node in prompt.items():
        for given in ("latent_image", "latent"):
            link = node["inputs"].get(given)
            if isinstance(link, list):
                changed[f"again {name}"] = {"class_type": "SoakAgain", "inputs": {"latent": link, "number": number}}
                changed[name]["inputs"][given] = [f"again {name}", 0]
    return changed
