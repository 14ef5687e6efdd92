"""The workflow of AnyStory, run with small random models in the places of the released files, whose sizes the host's
own loaders demand: every other node is the one that the workflow names."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import pytest
from comfy_extras import nodes_custom_sampler, nodes_flux, nodes_model_advanced, nodes_sd3
from host import ROOT, Server
from hosting.workflows import find_workflow, load_workflow
from subject_patches import SubjectPatches
from torch import Tensor

import nodes as host_nodes

from .anystory_models import golden_anystory, golden_model
from .models import difference
from .test_anystory_encoders import redux
from .test_anystory_nodes import Vae, siglip
from .test_anystory_runs import prompt

pytestmark = pytest.mark.usefixtures("in_inference_mode")

SIZE, STEPS = 128, 5


class SmallVae(Vae):
    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3].movedim(1, -1)


# What the loaders give.
_LOADED: dict[str, Callable[[], Any]] = {
    "UNETLoader": golden_model,
    "DualCLIPLoader": lambda: None,
    "CLIPTextEncode": prompt,
    "VAELoader": SmallVae,
    "CLIPVisionLoader": siglip,
    "StyleModelLoader": lambda: comfy.sd.StyleModel(redux()),
    "SubjectPatchesLoadAnyStory": golden_anystory,
}


async def _pack() -> dict[str, Any]:
    pack = SubjectPatches()
    await pack.on_load()
    return {node.GET_SCHEMA().node_id: node for node in await pack.get_node_list()}


def _class(name: str, pack: dict[str, Any]) -> Any:
    if name in pack:
        return pack[name]
    for module in (nodes_custom_sampler, nodes_flux, nodes_sd3, nodes_model_advanced):
        found = getattr(module, name, None) or getattr(module, "NODE_CLASS_MAPPINGS", {}).get(name)
        if found is not None:
            return found
    return host_nodes.NODE_CLASS_MAPPINGS[name]


def run(api: dict[str, Any], pack: dict[str, Any]) -> dict[str, Tensor]:
    """What a workflow in API format saves, by the names of the files."""
    values: dict[str, tuple[Any, ...]] = {}
    saved: dict[str, Tensor] = {}

    def of(number: str) -> tuple[Any, ...]:
        if number not in values:
            values[number] = done(api[number])
        return values[number]

    def done(node: dict[str, Any]) -> tuple[Any, ...]:
        name = node["class_type"]
        given = {key: of(v[0])[v[1]] if isinstance(v, list) else v for key, v in node["inputs"].items()}
        if name in _LOADED:
            return (_LOADED[name](),)
        if name == "SaveImage":
            saved[given["filename_prefix"]] = given["images"]
            return ()
        found = _class(name, pack)
        if not hasattr(found, "GET_SCHEMA"):
            return getattr(found(), found.FUNCTION)(**given)
        if not found.GET_SCHEMA().is_input_list:
            return found.execute(**given).args
        known = inspect.signature(found.execute).parameters
        return tuple(each for each in found.execute(**{k: [v] for k, v in given.items() if k in known}).args)

    for number in api:
        of(number)
    return saved


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_workflow_runs_with_small_models(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both pictures come, the one with subjects another than the one without."""
    monkeypatch.setattr(folder_paths, "input_directory", str(ROOT / "workflows" / "input"))
    api = server.to_api(load_workflow(find_workflow("anystory_flux")))
    known = server.object_info()
    for node in api.values():
        assert known[node["class_type"]]["input"].get("required", {}).keys() <= node["inputs"].keys(), node
        sizes = {"width": SIZE, "height": SIZE, "size": 64, "steps": STEPS}
        node["inputs"] |= {name: value for name, value in sizes.items() if name in node["inputs"]}
    saved = run(api, asyncio.run(_pack()))
    with_subjects, without = saved["anystory"], saved["anystory_without"]
    assert with_subjects.shape == without.shape == (1, SIZE // 8, SIZE // 8, 3)
    assert with_subjects.isfinite().all()
    assert difference(with_subjects, without) > 0.01


def test_the_files_it_needs_are_told() -> None:
    """README's and the help page's words name each of them."""
    told = (ROOT / "web" / "docs" / "SubjectPatchesLoadAnyStory.md").read_text(encoding="utf-8")
    workflow = load_workflow(find_workflow("anystory_flux"))
    values = [value for node in workflow["nodes"] for value in node.get("widgets_values") or ()]
    files = [Path(value).stem for value in values if isinstance(value, str) and value.endswith(".safetensors")]
    assert len(files) == 7
    assert [name for name in files if name not in told] == []
