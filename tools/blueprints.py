"""Write the subgraph blueprints that the host offers beside nodes: `python tools/blueprints.py`.

Each is made by the page of nodes of a shipped workflow: one box with the few inputs that a person should see. Needs
Chromium and its driver, as `tools/author.py` does.
"""

from __future__ import annotations

import json
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from host import ROOT, Server, find_host
from hosting.command import Parser, enter, run
from hosting.graphs import NOUNS_IN_PROMPT
from hosting.page import Page
from hosting.workflows import find_workflow, load_workflow

FOLDER = ROOT / "subgraphs"
# Where the page lists the boxes among blueprints.
CATEGORY = "Subject Patches"
_TEXT = "PrimitiveString"
# A box goes with models of pictures of 512 and of 1024 pixels.
_SUBJECT, _SIZE = "SubjectPatchesSubject", 512
_NAMESPACE = uuid.UUID("8f0c3f0e-11ba-4c8e-9c3e-6f1f5a6c1f0b")


@dataclass(frozen=True)
class Blueprint:
    """A box: the workflow whose nodes of these kinds it holds, and which of their widgets it shows, by their kind or
    title, and with a label where the name says too little; what the page says of it, what else it is found by, and what
    it calls sockets whose names say too little."""

    name: str
    description: str
    aliases: tuple[str, ...]
    workflow: str
    kinds: tuple[str, ...]
    widgets: tuple[tuple[str, ...], ...]
    labels: tuple[tuple[str, str], ...]


BLUEPRINTS = (
    Blueprint(
        "Reference (Subject Patches)",
        "Shows the subject of a picture in new pictures, without training: put it between the checkpoint's MODEL and "
        "the sampler. Set size to 3/4 of the picture's side.",
        ("ip adapter", "reference only", "character", "consistent"),
        "reference_sd15",
        ("SubjectPatchesSubject", "SubjectPatchesRecycledSelfAttention"),
        (("SubjectPatchesRecycledSelfAttention", "strength"), ("SubjectPatchesSubject", "size")),
        (("image", "your subject"),),
    ),
    Blueprint(
        "Two Subjects in Boxes (Subject Patches)",
        "Shows two subjects in one picture, each only in its own box. It holds the prompt, too: positive goes to the "
        "sampler. Set both sizes to 3/4 of the picture's side.",
        ("regional", "multi subject", "several characters", "ip adapter"),
        "two_subjects_sd15",
        (
            *("SubjectPatchesSubject", "SubjectPatchesLayout", "SubjectPatchesLayoutBias"),
            *("SubjectPatchesRouteByMasks", "SubjectPatchesRoutedReferenceAttention", "CreateBoundingBoxes"),
            *("SubjectPatchesEncodePrompt", "PrimitiveStringMultiline", "PrimitiveString", "StringFormat"),
        ),
        (
            *(("First noun", "value", "first noun"), ("Second noun", "value", "second noun")),
            *((NOUNS_IN_PROMPT, "f_string", "prompt"), ("PrimitiveStringMultiline", "value", "boxes")),
            *(("SubjectPatchesRoutedReferenceAttention", "strength"), ("SubjectPatchesLayoutBias", "guidance_weight")),
            *(("First subject", "size", "first size"), ("Second subject", "size", "second size")),
        ),
        (("image", "first subject"), ("image_1", "second subject"), ("CONDITIONING", "positive")),
    ),
    Blueprint(
        "Retouch (Subject Patches)",
        "Gives the subject of a picture the details of another picture, of any size. Sample at your picture's size and "
        "without noise (DisableNoise, or add_noise off), with the MODEL, the same SIGMAS, the latent to begin with, "
        "and a prompt by Encode Prompt with Subjects that has the phrase among its phrases. For SD 1.x, SD 2.x and "
        "SDXL.",
        ("MasaCtrl", "attention swap", "details", "Layout-and-Retouch"),
        "retouch_sd15",
        (
            *("SubjectPatchesInvertToTrajectory", "SubjectPatchesAdaptiveBlendMask", "SubjectPatchesMultiSourceSwap"),
            "VAEEncode",
        ),
        (
            *(("SubjectPatchesAdaptiveBlendMask", "phrase"), ("SubjectPatchesMultiSourceSwap", "lambda2")),
            ("SubjectPatchesMultiSourceSwap", "mask_blend_start"),
        ),
        (("pixels", "your picture"), ("pixels_1", "the details"), ("last_latent", "latent to begin with")),
    ),
)


def main() -> int:
    """The command line; see the module's text."""
    Parser(prog="blueprints.py", description="Write the subgraph blueprints.").parse_args()
    host = find_host(development=True)
    enter(host, Path(__file__), sys.argv[1:])
    FOLDER.mkdir(exist_ok=True)
    with Server(host) as server, Page(server.url) as page:
        for blueprint in BLUEPRINTS:
            target = FOLDER / f"{blueprint.name}.json"
            target.write_text(json.dumps(made(page, blueprint), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            print(target, flush=True)
    return 0


def _typed(workflow: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, Any]:
    """The workflow with words on the nodes of these kinds that come to them from a Text node which is not one, and
    references of one size."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    for node in workflow["nodes"]:
        widgets = [entry for entry in node["inputs"] if "widget" in entry]
        if node["type"] == _SUBJECT:
            # The phrase comes first.
            node["widgets_values"][1] = _SIZE
        for entry in widgets if node["type"] in kinds else ():
            source = nodes[links[entry["link"]][1]] if entry.get("link") in links else None
            if source is not None and source["type"] == _TEXT and _TEXT not in kinds:
                node["widgets_values"][widgets.index(entry)] = source["widgets_values"][0]
                source["outputs"][0]["links"].remove(entry["link"])
                del links[entry["link"]]
                entry["link"] = None
    return workflow | {"links": [*links.values()]}


def made(page: Page, blueprint: Blueprint) -> dict[str, Any]:
    """The blueprint in the form in which the page keeps one: a workflow of the box alone."""
    page.load(_typed(load_workflow(find_workflow(blueprint.workflow)), blueprint.kinds) | {"extra": {}})
    page.box(blueprint.name, blueprint.kinds, blueprint.widgets)
    _, workflow = page.export()
    (definition,) = workflow["definitions"]["subgraphs"]
    (box,) = (node for node in workflow["nodes"] if node["type"] == definition["id"])
    # The page may write a 0 there, which the first of the widgets would take.
    box.pop("widgets_values", None)
    fixed = str(uuid.uuid5(_NAMESPACE, blueprint.name))
    for socket in box["inputs"]:
        socket["link"] = None
    for socket in box["outputs"]:
        socket["links"] = None
    labels = dict(blueprint.labels)
    for each in (box, definition):
        for socket in (*each["inputs"], *each["outputs"]):
            if socket["name"] in labels:
                socket["label"] = labels[socket["name"]]
    definition |= {"category": CATEGORY, "description": blueprint.description}
    extra = {"BlueprintDescription": blueprint.description, "BlueprintSearchAliases": [*blueprint.aliases]}
    kept = {"revision": 0, "last_node_id": box["id"], "last_link_id": 0, "nodes": [box], "links": [], "groups": []}
    text = json.dumps({**kept, "definitions": workflow["definitions"], "version": 0.4, "id": fixed, "extra": extra})
    return json.loads(text.replace(definition["id"], str(uuid.uuid5(_NAMESPACE, f"{blueprint.name} box"))))


if __name__ == "__main__":
    run(main)
