"""Write the workflows for real checkpoints as the page saves them: `python tools/real_workflows.py [NAME ...]`.

What they are made of is in `tools/hosting/recipes.py`. Needs Chromium and its driver, as `tools/author.py` does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from author import save
from host import Server, find_host
from hosting.client import ApiPrompt
from hosting.command import Parser, enter, run
from hosting.graphs import graph_for
from hosting.page import Page
from hosting.recipes import WORKFLOWS
from hosting.workflows import FOLDER


def _complete(prompt: ApiPrompt, known: dict[str, Any]) -> ApiPrompt:
    """The prompt with every value that a new node has: the page keeps those of a node of another workflow otherwise."""
    for node in prompt.values():
        inputs = known[node["class_type"]]["input"]
        for name, (kind, *more) in (inputs.get("required", {}) | inputs.get("optional", {})).items():
            options = more[0] if more else {}
            listed = options.get("options") if kind == "COMBO" else kind if isinstance(kind, list) else None
            default = options.get("default", listed[0] if listed else None)
            if default is not None:
                node["inputs"].setdefault(name, default)
    return prompt


def _with_boxes(workflow: dict[str, Any]) -> dict[str, Any]:
    """The workflow with the boxes in the editor's own state: in API format the page takes a list for a link."""
    for node in workflow["nodes"]:
        if node["type"] == "PrimitiveStringMultiline":
            boxes = json.loads(node["widgets_values"][0])
            for other in workflow["nodes"]:
                if other["type"] == "CreateBoundingBoxes":
                    other["widgets_values"] = [512, 512, boxes, boxes]
    return workflow


def main() -> int:
    """The command line; see the module's text."""
    parser = Parser(prog="real_workflows.py", description="Write the workflows for real checkpoints.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these (by default all)")
    options = parser.parse_args()
    host = find_host(development=True)
    enter(host, Path(__file__), sys.argv[1:])
    with Server(host) as server, Page(server.url) as page:
        for kind, (make, families) in WORKFLOWS.items():
            for suffix, family in families.items():
                name = f"{kind}_{suffix}"
                if options.names and name not in options.names:
                    continue
                graph = graph_for(family)
                note = make(graph) + graph.note(kind)
                page.load_api(_complete(graph.prompt, server.object_info()), name)
                saved = save(page, _with_boxes(page.export()[1]), name, note)
                target = FOLDER / f"{name}.json"
                target.write_text(json.dumps(saved, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
                print(target, flush=True)
    return 0


if __name__ == "__main__":
    run(main)
