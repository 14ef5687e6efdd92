"""Run by the workflow client's interpreter: UI workflow and object info on stdin, API workflow on stdout."""

from __future__ import annotations

import json
import sys

from comfy_cli.workflow_to_api import WorkflowConversionError, convert_ui_to_api


def main() -> int:
    """Convert one workflow; exit code 3 with a line on stderr means that it is none."""
    question = json.load(sys.stdin)
    try:
        prompt = convert_ui_to_api(question["workflow"], question["object_info"])
    except WorkflowConversionError as error:
        print(error, file=sys.stderr)
        return 3
    json.dump(prompt, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
