"""Every shipped workflow in the server's page: what people see when they drag the file in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from author import save
from host import Server
from hosting.page import HOW_TO_GET, Page, find_browser
from hosting.workflows import load_workflow, workflow_files

pytestmark = pytest.mark.skipif(find_browser() is None, reason=f"there is no browser here; {HOW_TO_GET}")


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Page]:
    """The page of the session's server."""
    with Page(server.url) as opened:
        yield opened


@pytest.mark.parametrize("path", workflow_files(), ids=lambda path: path.stem)
def test_page_runs_what_the_tools_run(server: Server, page: Page, path: Path) -> None:
    """No node is missing, the page's API export is what the tools queue, and the file is what the page saves."""
    workflow = load_workflow(path)
    page.load(workflow)
    assert page.missing() == []
    prompt, saved = page.export()
    assert prompt == server.to_api(workflow)
    assert _lasting(saved) == _lasting(workflow)


def test_page_and_client_agree_on_titles_and_values(server: Server, page: Page, solid_workflow: dict[str, Any]) -> None:
    """A workflow that was written by hand is the same to the page and to the converter."""
    page.load(solid_workflow)
    assert page.missing() == []
    prompt, _ = page.export()
    assert prompt["1"]["inputs"]["color"] == 0xFF0000
    assert prompt == server.to_api(solid_workflow)


def test_missing_node_is_seen(page: Page, solid_workflow: dict[str, Any]) -> None:
    """The check for missing nodes does find one."""
    solid_workflow["nodes"][0]["type"] = "Nonesuch"
    page.load(solid_workflow)
    assert page.missing() == ["Nonesuch"]


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
    return {key: workflow[key] for key in ("nodes", "links", "groups")}
