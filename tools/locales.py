"""Write locales/en from the nodes themselves: `python tools/locales.py`. Others are written by hand, after it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from host import ROOT, find_host
from hosting.command import Parser, enter, run

FOLDER = ROOT / "locales"


def main() -> int:
    """The command line; see the module's text."""
    Parser(prog="locales.py", description="Write locales/en from the nodes themselves.").parse_args()
    host = find_host()
    enter(host, Path(__file__), sys.argv[1:])
    from hosting.pack import import_host, load_pack

    import_host(host.tree)
    load_pack(ROOT)
    target = FOLDER / "en" / "nodeDefs.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(as_text(english()), encoding="utf-8")
    print(target)
    return 0


def english() -> dict[str, Any]:
    """What the page shows of every node, by the host's keys; the pack must be loaded."""
    import subject_patches

    async def schemas() -> list[Any]:
        pack = subject_patches.SubjectPatches()
        await pack.on_load()
        return [node.GET_SCHEMA() for node in await pack.get_node_list()]

    return {schema.node_id: _node(schema) for schema in asyncio.run(schemas())}


def as_text(words: dict[str, Any]) -> str:
    """As a file of words is kept."""
    return json.dumps(words, indent=2, ensure_ascii=False) + "\n"


def _node(schema: Any) -> dict[str, Any]:
    inputs = {each.id: {"name": each.display_name or each.id, "tooltip": each.tooltip} for each in schema.inputs}
    outputs = {
        str(place): {"name": each.display_name or each.io_type, "tooltip": each.tooltip}
        for place, each in enumerate(schema.outputs)
    }
    words = {"display_name": schema.display_name, "description": schema.description, "inputs": inputs}
    return words | ({"outputs": outputs} if outputs else {})


if __name__ == "__main__":
    run(main)
