"""What a demo run shows a stranger: a page that holds its own pictures, and a wide sheet, one row a workflow."""

from __future__ import annotations

import base64
import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .arrange import NOTE
from .sheet import Group, fit

# The workflows from what most people look for to what looks inside.
ORDER = (
    *("emblem_in_a_scene_dit", "two_emblems_by_masks_dit", "emblem_in_a_scene", "two_emblems_by_masks"),
    *("emblem_by_a_trained_encoder", "emblem_by_a_tuned_model"),
    *("layout_by_boxes", "retouch_a_picture", "train_a_residual_token"),
    *("concept_and_the_prompt", "emblem_in_a_painted_region", "repaint_around_an_emblem", "layout_and_retouch"),
    *("two_emblems_by_attention_maps", "two_emblems_by_a_trained_encoder", "layout_by_masks"),
    "three_nodes_in_the_same_layers",
    *("text_to_image_dit", "text_to_image", "attention_inspector"),
)
_SIDE, _GAP, _MOST = 150, 14, 5
_TITLE, _TEXT = 22, 15
_TALLEST = 2000
# Of a picture's caption.
_LINES = 2
_PAPER, _INK, _FAINT = "#ffffff", "#111111", "#555555"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; color: #111; background: #fff }
section { border-top: 1px solid #ddd; padding: 1rem 0 } h2 { margin: 0 } p { margin: .3rem 0 1rem; max-width: 46rem }
div { display: flex; flex-wrap: wrap; gap: 1.2rem } figure { margin: 0 } figcaption { color: #555; font-size: .85rem }
img { height: 160px; image-rendering: auto; margin-right: 4px }
@media (prefers-color-scheme: dark) { body { color: #eee; background: #181818 } figcaption { color: #aaa } }
"""


@dataclass(frozen=True)
class Entry:
    """A workflow's row: its title, what to look at, and its groups of pictures from left to right."""

    title: str
    look: str
    groups: tuple[Group, ...]


def in_order(names: Sequence[str]) -> list[str]:
    """Names of workflows in the order of the gallery; those that it does not know come before the last one."""
    known = {name: place for place, name in enumerate(ORDER)}
    return sorted(names, key=lambda name: (known.get(name, len(ORDER) - 1.5), name))


def look_of(workflow: dict[str, Any]) -> str:
    """What a workflow's note says that it shows: its first paragraph, without Markdown."""
    notes = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == NOTE]
    first = notes[0].split("\n\n")[0] if notes else ""
    return " ".join(line for line in first.splitlines() if not line.startswith("#")).replace("*", "").replace("`", "")


def page(entries: Sequence[Entry]) -> str:
    """One HTML file that needs no other."""
    rows = "".join(map(_section, entries))
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Subject Patches</title><style>{_STYLE}</style>'
    return f"{head}<h1>Subject Patches</h1><p>Made by the small models that come with the pack.</p>{rows}</html>\n"


def _section(entry: Entry) -> str:
    figures = "".join(
        f"<figure>{''.join(map(_img, group.pictures))}<figcaption>{html.escape(group.caption)}</figcaption></figure>"
        for group in entry.groups
    )
    return f"<section><h2>{html.escape(entry.title)}</h2><p>{html.escape(entry.look)}</p><div>{figures}</div></section>"


def _img(picture: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'


def wide_sheet(entries: Sequence[Entry]) -> Image.Image:
    """The first picture of each group, a row a workflow, in as many columns as keep the sheet at most 2000 high."""
    width = _MOST * (_SIDE + _GAP)
    drawn = [_row(entry, width) for entry in entries]
    columns = 1
    while _height_of(stacked := _split(drawn, columns)) > _TALLEST and columns < len(drawn):
        columns += 1
    sheet = Image.new("RGB", (len(stacked) * (width + 2 * _GAP) + _GAP, _height_of(stacked)), _PAPER)
    for number, column in enumerate(stacked):
        top = _GAP
        for row in column:
            sheet.paste(row, (_GAP + number * (width + 2 * _GAP), top))
            top += row.height + 2 * _GAP
    return sheet


def _split(rows: Sequence[Image.Image], columns: int) -> list[list[Image.Image]]:
    each = -(-len(rows) // columns)
    return [list(rows[start : start + each]) for start in range(0, len(rows), each)]


def _height_of(columns: Sequence[Sequence[Image.Image]]) -> int:
    return _GAP + max(sum(row.height + 2 * _GAP for row in column) for column in columns)


def _row(entry: Entry, width: int) -> Image.Image:
    look = textwrap.wrap(entry.look, width // 7)
    head = _TITLE + _GAP // 2 + len(look) * (_TEXT + 4) + _GAP // 2
    row = Image.new("RGB", (width, head + _SIDE + _LINES * _TEXT + 6), _PAPER)
    draw = ImageDraw.Draw(row)
    draw.text((0, 0), entry.title, _INK, ImageFont.load_default(_TITLE))
    for number, line in enumerate(look):
        draw.text((0, _TITLE + _GAP // 2 + number * (_TEXT + 4)), line, _FAINT, ImageFont.load_default(_TEXT))
    for number, group in enumerate(entry.groups[:_MOST]):
        left = number * (_SIDE + _GAP)
        row.paste(fit(group.pictures[0], _SIDE), (left, head))
        for line, words in enumerate(textwrap.wrap(group.caption, 24)[:_LINES]):
            draw.text((left, head + _SIDE + 2 + line * _TEXT), words, _FAINT, ImageFont.load_default(12))
    return row
