"""Run by the workflow client's interpreter: UI workflows and object info on stdin, API workflows on stdout."""

from __future__ import annotations

import json
import sys

from comfy_cli.workflow_to_api import WorkflowConversionError, convert_ui_to_api


def main() -> int:
    """Convert workflows; exit code 3 with a line on stderr means that one of them is none."""
    question = json.load(sys.stdin)
    try:
        prompts = [convert_ui_to_api(workflow, question["object_info"]) for workflow in question["workflows"]]
    except WorkflowConversionError as error:
        print(error, file=sys.stderr)
        return 3
    json.dump(prompts, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
