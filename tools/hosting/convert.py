"""Run by the workflow client's interpreter: UI workflows and object info on stdin, API workflows on stdout."""

from __future__ import annotations

import json
import sys
from typing import Any

from comfy_cli.workflow_to_api import WorkflowConversionError, convert_ui_to_api


def main() -> int:
    """Convert workflows; exit code 3 with a line on stderr means that one of them is none."""
    question = json.load(sys.stdin)
    try:
        prompts = [_converted(workflow, question["object_info"]) for workflow in question["workflows"]]
    except WorkflowConversionError as error:
        print(error, file=sys.stderr)
        return 3
    json.dump(prompts, sys.stdout)
    return 0


def _converted(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    prompt = convert_ui_to_api(workflow, object_info)
    for node in workflow.get("nodes") or ():
        # The client takes the box editor's own state for a socket, and what belongs there for what comes next.
        if node["type"] == "CreateBoundingBoxes" and str(node["id"]) in prompt:
            for name, value in zip(("editor_state", "last_incoming"), node["widgets_values"][2:], strict=True):
                prompt[str(node["id"])]["inputs"][name] = {"__value__": value}
    return prompt


if __name__ == "__main__":
    sys.exit(main())
