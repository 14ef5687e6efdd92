"""Write workflow files as the page saves them, from workflows in API or UI format.

    python tools/author.py FILE [--name NAME] [--note TEXT]
    python tools/author.py workflows/*.json

The page itself saves the workflow to workflows/NAME.json (by default the name of FILE). The second line is for when
nodes have got inputs: every shipped workflow gets what a new node has there, and room for it. Nodes are laid out in
groups, Input, Subject, Generate and Compare; in a UI workflow a node stays in the group that it lies in. Node titles
come from each node's `_meta.title`. The note beside them is TEXT, Markdown, or stays as it is. Seeds are set to stay
fixed, so that the file gives the same pictures every time. Needs Chromium and its driver, as the browser tests do.
"""

from __future__ import annotations

import json
import math
import sys
import uuid
from pathlib import Path
from typing import Any

from host import Server, ToolError, find_host
from hosting.arrange import NOTE, TELLING, TITLE, TOLD, arrange
from hosting.command import Parser, enter, run
from hosting.page import Page
from hosting.workflows import FOLDER

# Names a workflow's own id after its file, so that writing it again changes nothing.
_NAMESPACE = uuid.UUID("3f0f7f5e-6f1f-4f3c-9f7e-5a6c1f0b2d11")
_CHANGING = {"randomize", "increment", "decrement"}


def main() -> int:
    """The command line; see the module's text."""
    parser = Parser(prog="author.py", description="Write workflow files as the page saves them.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a workflow in API or UI format")
    parser.add_argument("--note", help="what the note says, in Markdown")
    parser.add_argument("--name", help="the name in workflows/ (by default that of FILE)")
    options = parser.parse_args()
    if len(options.files) > 1 and (options.name or options.note):
        raise ToolError("A name and a note are of one workflow; give one FILE with them.")
    workflows = {options.name or path.stem: _read(path) for path in options.files}
    host = find_host(development=True)
    enter(host, Path(__file__), sys.argv[1:])
    FOLDER.mkdir(exist_ok=True)
    with Server(host) as server, Page(server.url) as page:
        for name, workflow in workflows.items():
            saved = save(page, workflow, name, options.note)
            if unknown := page.missing():
                raise ToolError(f"No node of the host or this pack is called {', '.join(unknown)}; correct {name}.")
            target = FOLDER / f"{name}.json"
            target.write_text(json.dumps(saved, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            print(target, flush=True)
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ToolError(f"{path} is no readable workflow ({error}); give a workflow's JSON file.") from error


def save(page: Page, workflow: dict[str, Any], name: str, note: str | None = None) -> dict[str, Any]:
    """What the page saves of `workflow`, laid out, with seeds that stay fixed and an id that depends on `name`."""
    if "nodes" not in workflow:
        page.load_api(workflow, name)
        _, workflow = page.export()
    for node in workflow["nodes"]:
        values = node.get("widgets_values") or []
        node["widgets_values"] = ["fixed" if isinstance(v, str) and v in _CHANGING else v for v in values]
    if note is not None:
        _note(workflow, note)
    page.load(workflow)
    workflow = _arranged(page, page.export()[1])
    page.load(workflow)
    page.settle()
    # Last, as every load may leave something there.
    page.forget_linked()
    _, saved = page.export()
    # The page that saves is not the screen that a workflow will be opened on.
    saved["extra"]["ds"] = workflow["extra"]["ds"]
    return saved | {"id": str(uuid.uuid5(_NAMESPACE, name))}


def _arranged(page: Page, workflow: dict[str, Any]) -> dict[str, Any]:
    """The open workflow laid out with room for all that its nodes show, on the canvas and in Nodes 2.0, also of what
    they say while they run."""
    _tell(page, workflow)
    sizes, grown = page.least_sizes(), {}
    page.modern(True)
    try:
        while sizes != grown:
            # How wide a node is, and with it how high, depends on what stands in its column.
            sizes = grown or sizes
            laid = arrange(workflow, sizes)
            page.load(laid)
            _tell(page, workflow)
            heights = {number: math.ceil(height - TITLE) for number, (*_, height) in page.grown().items()}
            grown = {number: [width, max(height, heights[number])] for number, (width, height) in sizes.items()}
    finally:
        page.modern(False)
    return laid


def _tell(page: Page, workflow: dict[str, Any]) -> None:
    for node in workflow["nodes"]:
        if node["type"] in TELLING:
            page.tell(node["id"], TOLD)
    page.settle()


def _note(workflow: dict[str, Any], text: str) -> None:
    notes = [node for node in workflow["nodes"] if node["type"] == NOTE]
    if not notes:
        number = max(node["id"] for node in workflow["nodes"]) + 1
        workflow["last_node_id"] = max(number, workflow["last_node_id"])
        notes = [{"id": number, "type": NOTE, "pos": [0, 0], "size": [420, 300], "title": "What this shows"}]
        notes[0] |= {"inputs": [], "outputs": [], "flags": {}, "mode": 0, "order": 0, "properties": {}}
        workflow["nodes"] += notes
    notes[0]["widgets_values"] = [text]


if __name__ == "__main__":
    run(main)
