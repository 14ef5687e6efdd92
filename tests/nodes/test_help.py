"""What a person sees of every node: its name, its place in the menu, its tooltips, and its help page with a picture."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from host import ROOT, Server
from subject_patches.tests.shared.schemas import NODES, SCHEMAS

HELP = ROOT / "web" / "docs"


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.node_id)
def test_node_explains_itself(schema: Any) -> None:
    """It has a display name, a folder in the menu, words to find it by, a description, and a tooltip on each part."""
    assert schema.display_name
    pack, _, task = schema.category.partition("/")
    assert pack == "Subject Patches"
    assert task
    assert len(schema.search_aliases) > 1
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
    _, *told = re.split(r"^## Outputs?$", text, flags=re.MULTILINE)
    assert len(told) == bool(outputs)
    assert [name for name in outputs if f"- `{name}`" not in told[0].split("\n## ")[0]] == []
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert pictures
    assert [name for name in pictures if not (HELP / name).is_file()] == []


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.node_id)
def test_a_workflow_may_leave_advanced_inputs_out(schema: Any) -> None:
    """The host asks for none, and the node takes for it what the page would have given."""
    node = NODES[schema.node_id]
    # Nodes that take their inputs as lists hand the values on.
    taken = next(getattr(node, name) for name in ("trained", "made", "execute") if hasattr(node, name))
    given = inspect.signature(taken).parameters
    for each in schema.inputs:
        if each.as_dict().get("advanced"):
            assert each.optional, each.id
            # One that is given as a list may be settled within.
            assert given[each.id].default in (getattr(each, "default", None), *([None] if schema.is_input_list else []))


def test_a_picture_made_without_the_node_is_said_to_be() -> None:
    """A help page's picture is of a workflow that has the node, or is no workflow's; else a line below it says more."""
    workflows = {path.stem: path.read_text("utf-8") for path in (ROOT / "workflows").glob("*.json")}
    silent = []
    for schema in SCHEMAS:
        text = (HELP / f"{schema.node_id}.md").read_text(encoding="utf-8")
        for stem, below in re.findall(r"!\[[^\]]+\]\((\w+)\.jpg\)\n\n(.)", text):
            if f'"{schema.node_id}"' not in workflows.get(stem, f'"{schema.node_id}"') and below != "*":
                silent.append(schema.node_id)
    assert silent == []


def test_help_pages_name_a_workflow_to_begin_with() -> None:
    """Where a shipped workflow has the node, its page names one."""
    workflows = {path.stem: path.read_text("utf-8") for path in (ROOT / "workflows").glob("*.json")}
    for schema in SCHEMAS:
        having = {stem for stem, text in workflows.items() if f'"{schema.node_id}"' in text}
        told = re.findall(r"`(\w+)`", (HELP / f"{schema.node_id}.md").read_text(encoding="utf-8"))
        assert not having or having & {*told}, schema.node_id


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.node_id)
def test_help_page_says_what_a_list_does(schema: Any) -> None:
    """The host runs a node once for each element of a list, but for those that take a list whole."""
    _, told = (HELP / f"{schema.node_id}.md").read_text(encoding="utf-8").split("## Lists and batches\n\n")
    section = told.split("\n## ")[0]
    once = section.startswith("A list at any input runs this node once for each element, and gives a list; ")
    assert once != schema.is_input_list
    assert section.startswith("A list of pictures is one") == schema.is_input_list


def test_every_help_page_belongs_to_a_node() -> None:
    """No page outlives its node."""
    assert {path.stem for path in HELP.glob("*.md")} == {schema.node_id for schema in SCHEMAS}


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.node_id)
def test_help_page_sends_nobody_to_a_node_that_is_not_there(schema: Any, server: Server) -> None:
    """What stands in bold before the errors is a node by the name that the page shows, or an emphasised word."""
    shown = [info["display_name"] or name for name, info in server.object_info().items()]
    # The host says in brackets what some of its nodes are for.
    names = {*shown, *(name.split(" (")[0] for name in shown)}
    text, *_ = (HELP / f"{schema.node_id}.md").read_text(encoding="utf-8").split("## If it stops")
    bold = {" ".join(words.split()) for words in re.findall(r"\*\*([^*]+)\*\*", text)}
    assert sorted(words for words in bold - names if not words.islower()) == []


def test_readme_names_every_node_and_every_workflow() -> None:
    """Its tables leave none out, and name no workflow that is gone."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [schema.display_name for schema in SCHEMAS if f"**{schema.display_name}**" not in text] == []
    cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", text, re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"\w+", cell)]
    files = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    assert sorted(named) == sorted(files)


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_links_and_files_in_the_documents_are_there(path: Any) -> None:
    """Links lead to files, and so does what is named as a file of this repository."""
    text = path.read_text(encoding="utf-8")
    links = [path.parent / target for target in re.findall(r"\]\(([^):#]+)\)", text)]
    named = re.findall(r"`((?:patches|nodes|toy|tools|tests|docs|training|web|workflows)/[\w./]*\w)`", text)
    placeholders = {"patches/mechanisms/NAME.py", "nodes/NAME.py"}
    assert [
        str(target) for target in (*links, *(ROOT / name for name in set(named) - placeholders)) if not target.exists()
    ] == []
