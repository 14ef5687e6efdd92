"""Every shipped workflow in the server's page: what people see when they drag the file in."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from author import save
from blueprints import BLUEPRINTS
from host import ROOT, Server
from hosting.arrange import NOTE, SCREEN, TELLING, TOLD
from hosting.arrange import TITLE as TITLE_BAR
from hosting.page import HOW_TO_GET, Page, find_browser
from hosting.wiring import WIRES
from hosting.workflows import load_workflow, real_workflow_files, workflow_files

pytestmark = pytest.mark.skipif(find_browser() is None, reason=f"there is no browser here; {HOW_TO_GET}")


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Page]:
    """The page of the session's server."""
    with Page(server.url) as opened:
        yield opened


# As high as the page writes groups' titles, in its own pixels.
TITLE = 20
FILES = [*workflow_files(), *real_workflow_files()]


@pytest.fixture(scope="module")
def prompts(server: Server) -> dict[str, Any]:
    """Each workflow in API format, as the tools convert it."""
    converted = server.to_api_each([load_workflow(path) for path in FILES])
    return dict(zip((path.stem for path in FILES), converted, strict=True))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_page_runs_what_the_tools_run(page: Page, prompts: dict[str, Any], path: Path) -> None:
    """No node is missing, the page's API export is what the tools queue, and the file is what the page saves. Nodes lie
    in titled groups and none over another, on opening and with what a run shows and says; no link runs behind a node.
    What is written on nodes can be read on opening."""
    workflow = load_workflow(path)
    page.load(workflow)
    assert page.missing() == []
    assert page.legible()
    prompt, saved = page.export()
    assert prompt == prompts[path.stem]
    assert _lasting(saved) == _lasting(workflow)
    _check_canvas(page, workflow)
    assert page.links_behind() == []
    before = page.bounds()
    telling = [node["id"] for node in workflow["nodes"] if node["type"] in TELLING]
    for node in workflow["nodes"]:
        if node["type"] in ("SaveImage", "PreviewImage"):
            page.show_pictures(node["id"], "subject_patches_emblem.png", 2)
        if node["id"] in telling:
            page.tell(node["id"], TOLD)
    page.settle()
    _check_canvas(page, workflow)
    least, after = page.least_sizes(), page.bounds()
    # The page makes a node larger that has no room for what it says.
    assert all(least[number][1] + TITLE_BAR <= after[number][3] == before[number][3] for number in telling)


@pytest.mark.parametrize("stem", ["layout_by_boxes", "two_subjects_sdxl", "train_a_residual_token"])
def test_nodes_have_room_in_nodes_2(page: Page, stem: str) -> None:
    """Drawn by Nodes 2.0, where the editor of boxes appears and the pack's name stands on its nodes."""
    workflow = load_workflow(ROOT / "workflows" / f"{stem}.json")
    page.modern(True)
    try:
        page.load(workflow)
        bounds = page.grown()
    finally:
        page.modern(False)
    assert [pair for pair in itertools.combinations(bounds, 2) if _overlap(*(bounds[each] for each in pair))] == []
    editors = [node["id"] for node in workflow["nodes"] if node["type"] == "CreateBoundingBoxes"]
    assert all(bounds[number][3] > 400 for number in editors)


def _check_canvas(page: Page, workflow: dict[str, Any]) -> None:
    bounds = page.bounds()
    notes = [node["id"] for node in workflow["nodes"] if node["type"] == NOTE]
    assert len(notes) == 1
    assert [pair for pair in itertools.combinations(bounds, 2) if _overlap(*(bounds[each] for each in pair))] == []
    groups = [group["bounding"] for group in workflow["groups"]]
    assert all(group["title"] for group in workflow["groups"])
    assert not any(_overlap(one, other) for one, other in itertools.combinations(groups, 2))
    seen = [*groups, *bounds.values()]
    size = [max(box[side] + box[side + 2] for box in seen) - min(box[side] for box in seen) for side in (0, 1)]
    zoom = min(has / needs for has, needs in zip(SCREEN, size, strict=True))
    assert zoom * TITLE >= 9
    lost = [number for number, box in bounds.items() if not any(_holds(group, box) for group in groups)]
    assert lost == notes


def _overlap(one: list[float], other: list[float]) -> bool:
    return all(one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2] for axis in (0, 1))


def _holds(group: list[float], box: list[float]) -> bool:
    return all(
        group[axis] <= box[axis] and box[axis] + box[axis + 2] <= group[axis] + group[axis + 2] for axis in (0, 1)
    )


def test_page_and_client_agree_on_titles_and_values(server: Server, page: Page, solid_workflow: dict[str, Any]) -> None:
    """A workflow that was written by hand is the same to the page and to the converter."""
    page.load(solid_workflow)
    assert page.missing() == []
    prompt, _ = page.export()
    assert prompt["1"]["inputs"]["color"] == 0xFF0000
    assert prompt == server.to_api(solid_workflow)


def test_the_host_offers_the_blueprints(server: Server, page: Page) -> None:
    """Each is a box of nodes that are there, of the pack's own making, with links to bring and widgets to set."""
    offered = {each["name"] for each in server.blueprints().values()}
    described = {each.name: each for each in BLUEPRINTS}
    for path in sorted((ROOT / "subgraphs").glob("*.json")):
        blueprint = json.loads(path.read_text(encoding="utf-8"))
        assert path.stem in offered
        page.load(blueprint)
        assert page.missing() == []
        (box,) = blueprint["nodes"]
        (definition,) = blueprint["definitions"]["subgraphs"]
        assert box["type"] == definition["id"]
        assert {node["type"] for node in definition["nodes"]} <= {*server.object_info()}
        shown, (prompt, _) = box["properties"]["proxyWidgets"], page.export()
        nodes = {str(node["id"]): {node["type"], node.get("title")} for node in definition["nodes"]}
        # The page finds them by kinds and titles, which workflows may have no more.
        for of, name, *_ in described[path.stem].widgets:
            assert any(widget == name and of in nodes[number] for number, widget in shown), (path.stem, of, name)
        # What the file keeps for the box itself would take the place of what stands on the nodes inside.
        assert not box.get("widgets_values")
        inside = {str(node["id"]): node["widgets_values"] for node in definition["nodes"]}
        for number, widget in shown:
            assert prompt[f"{box['id']}:{number}"]["inputs"][widget] in inside[number], (path.stem, widget)
        assert len(box["inputs"]) > 2
        assert definition["description"] == blueprint["extra"]["BlueprintDescription"]


def test_missing_node_is_seen(page: Page, solid_workflow: dict[str, Any]) -> None:
    """The check for missing nodes does find one."""
    solid_workflow["nodes"][0]["type"] = "Nonesuch"
    page.load(solid_workflow)
    assert page.missing() == ["Nonesuch"]


def test_link_behind_a_node_is_seen(page: Page) -> None:
    """Without its reroutes the checkpoint's CLIP goes to the prompts straight through the picture."""
    workflow = load_workflow(ROOT / "workflows" / "reference_sd15.json")
    page.load(workflow | {"extra": {}})
    kinds = {node["id"]: node["type"] for node in workflow["nodes"]}
    assert ("CheckpointLoaderSimple", "LoadImage") in {
        (kinds[source], kinds[node]) for source, node in page.links_behind()
    }


def test_saved_workflow_is_stable(page: Page, solid_workflow: dict[str, Any]) -> None:
    """What the authoring tool writes, the page saves again unchanged; a seed that would change is fixed."""
    prompt = {
        "1": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "2": {"class_type": "RandomNoise", "inputs": {"noise_seed": 7}, "_meta": {"title": "Noise"}},
    }
    saved = save(page, prompt, "noise")
    assert [node.get("title") for node in saved["nodes"]] == [None, "Noise"]
    assert saved["nodes"][1]["widgets_values"] == [7, "fixed"]
    assert save(page, saved, "noise") == saved


def _lasting(workflow: dict[str, Any]) -> dict[str, Any]:
    # The canvas position and the page's version differ between two people who save the same.
    return {key: workflow[key] for key in ("nodes", "links", "groups")} | {"reroutes": workflow["extra"].get(WIRES[0])}
