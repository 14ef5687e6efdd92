"""What a person sees of every node: its name, its place in the menu, its tooltips, and its help page with a picture."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
import subject_patches
from host import ROOT

HELP = ROOT / "web" / "docs"


async def _schemas() -> list[Any]:
    pack = subject_patches.SubjectPatches()
    await pack.on_load()
    return [node.GET_SCHEMA() for node in await pack.get_node_list()]


SCHEMAS = asyncio.run(_schemas())


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.node_id)
def test_node_explains_itself(schema: Any) -> None:
    """It has a display name, the pack's category, a description, and a tooltip on each input and output."""
    assert schema.display_name
    assert schema.category == "Subject Patches"
    assert schema.description
    parts = (*schema.inputs, *schema.outputs)
    assert parts
    assert [part.id for part in parts if not part.tooltip] == []


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.node_id)
def test_help_page_names_every_input_and_shows_a_picture(schema: Any) -> None:
    """The page is called after the node, begins with its name, and has each input, each output and a picture."""
    text = (HELP / f"{schema.node_id}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {schema.display_name}\n")
    assert [each.id for each in schema.inputs if f"`{each.id}`" not in text] == []
    outputs = [each.display_name or each.io_type for each in schema.outputs]
    assert [name for name in outputs if f"`{name}`" not in text] == []
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert pictures
    assert [name for name in pictures if not (HELP / name).is_file()] == []


def test_every_help_page_belongs_to_a_node() -> None:
    """No page outlives its node."""
    assert {path.stem for path in HELP.glob("*.md")} == {schema.node_id for schema in SCHEMAS}
