"""The workflow files of this checkout: finding them, adapting them, and reading what a run of one gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import manifest_entries
from .client import ApiPrompt
from .errors import ToolError, WorkflowError
from .paths import ROOT
from .server import Server

if TYPE_CHECKING:
    from .sheet import Group

FOLDER = ROOT / "workflows"
_CHECKPOINTS = ("_sd15", "_sdxl")
# The workflow for the small model that shows what those for real models show, by their names without the model's.
_NEAREST = {
    "reference": "emblem_in_a_scene",
    "small_region": "emblem_in_a_painted_region",
    "two_subjects": "two_emblems_by_masks",
    "layout": "layout_by_boxes",
    "concept": "concept_and_the_prompt",
    "use_a_concept": "concept_and_the_prompt",
    "retouch": "retouch_a_picture",
    "anystory": "emblem_by_a_trained_encoder",
}
# The same for the small transformer, of those for transformers.
_NEAREST_DIT = {"reference": "emblem_in_a_scene_dit", "two_subjects": "two_emblems_by_masks_dit"}


def workflow_files() -> list[Path]:
    """Every shipped workflow but those of `real_workflow_files`, in the order of their names."""
    return sorted(path for path in FOLDER.glob("*.json") if not path.stem.endswith(_CHECKPOINTS))


def real_workflow_files() -> list[Path]:
    """Every shipped workflow for a checkpoint of Stable Diffusion, in the order of their names, which end with it."""
    return sorted(path for path in FOLDER.glob("*.json") if path.stem.endswith(_CHECKPOINTS))


def borrowed_pictures() -> dict[Path, Path]:
    """The picture of each workflow that a machine without its models cannot draw, and the one that stands for it: of
    the nearest workflow for the small model."""
    drawn = {path.stem for path in complete_workflows()}
    others = [path for path in (*workflow_files(), *real_workflow_files()) if path.stem not in drawn]
    return {path.with_suffix(".jpg"): FOLDER / f"{_nearest(path.stem)}.jpg" for path in others}


def _nearest(name: str) -> str:
    kind = name.rsplit("_", 1)[0]
    return _NEAREST[kind] if name.endswith(_CHECKPOINTS) else _NEAREST_DIT.get(kind, _NEAREST[kind])


def complete_workflows() -> list[Path]:
    """Those that load no model's file but the repository's own: they run on any machine."""
    shipped = {entry["file"] for entry in manifest_entries() if entry["path"] is not None}
    return [path for path in workflow_files() if _files(load_workflow(path)) <= shipped]


def _files(workflow: dict[str, Any]) -> set[str]:
    values = (value for node in workflow["nodes"] for value in node.get("widgets_values") or ())
    return {value for value in values if isinstance(value, str) and value.endswith(".safetensors")}


def find_workflow(name: str) -> Path:
    """The workflow file called `name`, with or without .json; raises ToolError with the names there are."""
    stem = name.removesuffix(".json")
    every = (*workflow_files(), *real_workflow_files())
    for path in every:
        if path.stem == stem:
            return path
    names = ", ".join(path.stem for path in every) or "none"
    raise ToolError(f"There is no workflow {name!r} in {FOLDER}; the names are: {names}.")


def load_workflow(path: Path) -> dict[str, Any]:
    """Read a workflow in UI format; raises ToolError if it is none."""
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ToolError(f"{path} cannot be read as a workflow ({error}); save it again from the page.") from error
    if not isinstance(workflow, dict) or not isinstance(workflow.get("nodes"), list):
        raise ToolError(f"{path} is no workflow in UI format; save it from the page with Save, not Export (API).")
    return workflow


def use_checkpoint(prompt: ApiPrompt, name: str) -> None:
    """Make every node that loads a checkpoint load the one called `name`; raises ToolError if there is no such node."""
    loaders = [node for node in prompt.values() if "ckpt_name" in node["inputs"]]
    if not loaders:
        raise ToolError("The workflow loads no checkpoint, so --checkpoint changes nothing; run it without.")
    for node in loaders:
        node["inputs"]["ckpt_name"] = name


def fetch_groups(server: Server, workflow: dict[str, Any], outputs: dict[str, dict[str, Any]]) -> list[Group]:
    """The pictures of a run, one group an output node, as the nodes lie on the canvas: left to right, then downwards.

    A group's caption is the title of its node. Raises WorkflowError if the run gave no picture.
    """
    # Pillow is there only in the host's interpreter.
    from .sheet import Group

    nodes = {str(node["id"]): node for node in workflow["nodes"]}
    groups = []
    for node_id in sorted(outputs, key=lambda node_id: _place(nodes.get(node_id))):
        images = outputs[node_id].get("images", [])
        if images:
            caption = _title(nodes.get(node_id), node_id)
            groups.append(Group(caption, tuple(server.fetch(image) for image in images)))
    if not groups:
        raise WorkflowError("The workflow ran and gave no picture; add a Save Image node.")
    return groups


def _place(node: dict[str, Any] | None) -> tuple[float, float]:
    x, y = (node or {}).get("pos") or (0.0, 0.0)
    return float(x), float(y)


def _title(node: dict[str, Any] | None, node_id: str) -> str:
    node = node or {}
    return node.get("title") or node.get("type") or f"node {node_id}"
