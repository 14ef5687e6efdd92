"""Every shipped workflow, run on a real server by comfy-cli, a client that nobody here wrote."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host import Server
from hosting.errors import ToolError, WorkflowError
from hosting.paths import environment_python
from hosting.private import client_folder, ensure_client
from hosting.workflows import (
    complete_workflows,
    fetch_groups,
    find_workflow,
    load_workflow,
    real_workflow_files,
    use_checkpoint,
    workflow_files,
)
from PIL import Image
from subject_patches.patches.parts.prompt import split_phrases


@pytest.mark.parametrize("path", complete_workflows(), ids=lambda path: path.stem)
def test_comfy_cli_runs_workflow(server: Server, path: Path, tmp_path: Path) -> None:
    """The workflow ends well, and each of its pictures shows something."""
    before = set((server.base / "output").rglob("*.png"))
    workflow = load_workflow(path)
    if any(node["type"] == "CreateBoundingBoxes" for node in workflow["nodes"]):
        # What the editor keeps is lost by the client's own converter, not by the page's.
        path = tmp_path / path.name
        path.write_text(json.dumps(server.to_api(workflow)))
    output = _comfy_run(server, path, tmp_path)
    written = sorted(set((server.base / "output").rglob("*.png")) - before)
    assert written, output
    for picture in written:
        with Image.open(picture) as image:
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert pixels.std(axis=0).max() > 1, f"{picture.name} is one colour all over"


def test_comfy_cli_runs_what_to_api_converts(server: Server, solid_workflow: dict[str, Any], tmp_path: Path) -> None:
    """The client and the tools' own queue give the same picture for the same workflow in UI format."""
    path = tmp_path / "solid.json"
    path.write_text(json.dumps(solid_workflow))
    _comfy_run(server, path, tmp_path)
    with Image.open(server.base / "output" / "red_00002_.png") as image:
        by_client = np.asarray(image)
    # Under the same name the host would give the client's pictures again without running anything.
    solid_workflow["nodes"][1]["widgets_values"] = ["ours"]
    groups = fetch_groups(server, solid_workflow, server.queue(server.to_api(solid_workflow), workflow=solid_workflow))
    assert [(group.caption, len(group.pictures)) for group in groups] == [("Red", 2)]
    picture = tmp_path / "ours.png"
    picture.write_bytes(groups[0].pictures[1])
    with Image.open(picture) as image:
        ours = np.asarray(image)
        assert json.loads(image.info["workflow"]) == solid_workflow
    assert by_client.shape == (32, 48, 3)
    assert (by_client == [255, 0, 0]).all()
    assert np.array_equal(by_client, ours)


def test_workflows_run_without_advanced_inputs(server: Server) -> None:
    """A workflow in API format that was saved before such an input was added is refused nothing and runs."""
    known = server.object_info()
    prompts = server.to_api_each([load_workflow(path) for path in workflow_files()])
    left = 0
    for prompt in prompts:
        for node in prompt.values():
            described = known[node["class_type"]]["input"]
            if node["class_type"].startswith("SubjectPatches"):
                optional = described.get("optional", {})
                advanced = {name for name, (_, *more) in optional.items() if more and more[0].get("advanced")}
                left += len(advanced & node["inputs"].keys())
                node["inputs"] = {name: value for name, value in node["inputs"].items() if name not in advanced}
                assert described.get("required", {}).keys() <= node["inputs"].keys(), node
    assert left > 100
    stems = [path.stem for path in workflow_files()]
    assert server.queue(prompts[stems.index("attention_inspector")])


@pytest.mark.parametrize("path", [*workflow_files(), *real_workflow_files()], ids=lambda path: path.stem)
def test_what_is_shown_before_a_run(path: Path) -> None:
    """The editor of boxes has those that are there in numbers. A note has no code: Nodes 2.0 draws it blue on blue. No
    other text stands where one comes by a link."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for node in load_workflow(path)["nodes"]:
        kinds.setdefault(node["type"], []).append(node)
    for editor in kinds.get("CreateBoundingBoxes", ()):
        (numbers,) = kinds["PrimitiveStringMultiline"]
        width, height, *states = editor["widgets_values"]
        assert [width, height] == kinds["SubjectPatchesLayout"][0]["widgets_values"][:2]
        assert [*states] == [json.loads(numbers["widgets_values"][0])] * 2
    assert ["`" in note["widgets_values"][0] for note in kinds["MarkdownNote"]] == [False]
    for prompt in (*kinds.get("CLIPTextEncode", ()), *kinds.get("SubjectPatchesEncodePrompt", ())):
        linked = any(entry["name"] == "text" and entry.get("link") is not None for entry in prompt["inputs"])
        assert not linked or prompt["widgets_values"][0] == "", prompt["id"]


def test_each_noun_is_written_once(server: Server) -> None:
    """What a phrase, a noun or a box is called can be changed in one place: links bring it where else it is needed."""
    files = [*workflow_files(), *real_workflow_files()]
    for path, prompt in zip(files, server.to_api_each([load_workflow(path) for path in files]), strict=True):
        named, written = set(), []
        for node in prompt.values():
            for name, value in node["inputs"].items():
                if not isinstance(value, str):
                    continue
                written.append(value)
                if name in ("phrase", "phrases", "noun", "concept") or node["class_type"] == "PrimitiveString":
                    named |= {*split_phrases(value)}
                if node["class_type"] == "PrimitiveStringMultiline":
                    named |= {box["metadata"]["desc"] for box in json.loads(value)} - {""}
        places = {noun: sum(len(re.findall(rf"\b{re.escape(noun)}\b", text)) for text in written) for noun in named}
        assert {noun for noun, count in places.items() if count > 1} == set(), path.stem


def test_unconvertible_workflow_is_one_sentence(server: Server) -> None:
    """What is no workflow is refused by the converter with its reason."""
    with pytest.raises(WorkflowError, match=r"could not be converted.*links"):
        server.to_api({"nodes": []})


def test_find_workflow_lists_the_names() -> None:
    """A wrong name is answered with the names there are."""
    with pytest.raises(ToolError, match=r"no workflow 'nonesuch\.json'"):
        find_workflow("nonesuch.json")


@pytest.mark.parametrize("text", ["{", "[]", '{"1": {"class_type": "SaveImage"}}'])
def test_load_workflow_refuses_other_files(tmp_path: Path, text: str) -> None:
    """Broken JSON and API format are refused by name."""
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ToolError, match=re.escape(str(path))):
        load_workflow(path)


def test_use_checkpoint() -> None:
    """Every loader gets the name, and a workflow without one is refused."""
    prompt = {"1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "toy.safetensors"}}}
    use_checkpoint(prompt, "other.safetensors")
    assert prompt["1"]["inputs"]["ckpt_name"] == "other.safetensors"
    with pytest.raises(ToolError, match="loads no checkpoint"):
        use_checkpoint({"1": {"class_type": "EmptyImage", "inputs": {}}}, "other.safetensors")


def _comfy_run(server: Server, path: Path, home: Path) -> str:
    ensure_client(offline=True)
    comfy = environment_python(client_folder() / "environment").with_name("comfy.exe" if os.name == "nt" else "comfy")
    command = [str(comfy), "--skip-prompt", "--no-enable-telemetry", "run", "--workflow", str(path), "--wait"]
    command += ["--host", "127.0.0.1", "--port", str(server.port), "--timeout", "120"]
    # The client keeps its settings in the home folder; the person's own are none of the tests' business.
    environment = os.environ | {"HOME": str(home), "USERPROFILE": str(home), "DO_NOT_TRACK": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output
