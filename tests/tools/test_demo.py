"""What the demo writes: one file a picture, and a contact sheet and thumbnails that show them."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from host import Server
from hosting.errors import WorkflowError
from hosting.gallery import Entry, in_order, look_of, page, wide_sheet
from hosting.paths import ROOT
from hosting.pip import clean_environment
from hosting.sheet import Group, draw_borrowed, draw_sheet, draw_thumbnail, fit
from hosting.workflows import FOLDER, borrowed_pictures, complete_workflows, fetch_groups, load_workflow
from PIL import Image, ImageChops, ImageStat

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def _png(colour: tuple[int, int, int], width: int = 8, height: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("path", complete_workflows()[:1], ids=lambda path: path.stem)
def test_demo_writes_what_it_prints(path: Path) -> None:
    """The command prints the path of each picture and, last, of the gallery that holds them."""
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "--workflow", path.stem]
    began = time.time()
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    printed = [Path(line) for line in done.stdout.splitlines()]
    assert len(printed) > 1
    assert [path.name for path in printed[-2:]] == ["gallery.png", "gallery.html"]
    assert printed[-1].read_text(encoding="utf-8").count("data:image/png;base64,") == len(printed) - 2
    for picture in printed[:-1]:
        assert picture.stat().st_mtime >= began - 2
        with Image.open(picture) as image:
            image.verify()
    with Image.open(printed[0]) as image:
        assert json.loads(image.info["workflow"]) == load_workflow(path)


def test_gallery_is_one_page_and_one_sheet_of_some_height() -> None:
    """In the reader's order, the inspector last; each row has its caption, and the page needs no other file."""
    names = ["attention_inspector", "something_new", "emblem_in_a_scene"]
    assert in_order(names) == ["emblem_in_a_scene", "something_new", "attention_inspector"]
    groups = (Group("Before", (_png(RED),) * 2), Group("After & more", (_png(GREEN),)))
    entries = [Entry(f"Row {number}", "Look at this.", groups) for number in range(20)]
    sheet = wide_sheet(entries)
    assert sheet.height <= 2000 < sheet.width
    assert {RED, GREEN} <= {colour for _, colour in sheet.getcolors(maxcolors=1 << 20)}
    text = page(entries)
    assert text.count("data:image/png;base64,") == 60
    assert "After &amp; more" in text
    assert re.findall(r"(?:src|href)=\"(?!data:)", text) == []


@pytest.mark.parametrize("path", complete_workflows(), ids=lambda path: path.stem)
def test_every_workflow_says_what_to_look_at(path: Path) -> None:
    assert len(look_of(load_workflow(path))) > 20


def test_sheet_shows_every_picture_in_order() -> None:
    """Two workflows, five and two pictures: down the sheet the colours come in the order given."""
    blocks = [
        ("First", [Group("Before", (_png(RED),) * 5), Group("After", (_png(GREEN),))]),
        ("Second", [Group("Only", (_png(BLUE),))]),
    ]
    sheet = draw_sheet(blocks)
    column = [sheet.getpixel((20, y)) for y in range(sheet.height)]
    runs = [colour for colour, before in zip(column, [None, *column], strict=False) if colour != before]
    assert [colour for colour in runs if colour in (RED, GREEN, BLUE)] == [RED, RED, GREEN, BLUE]
    counts = {colour: count for count, colour in sheet.getcolors(maxcolors=1 << 20)}
    assert counts[RED] == 5 * counts[GREEN] == 5 * counts[BLUE] > 0
    # The captions and titles are drawn, in other colours than the paper and the pictures.
    assert len(counts) > 10


def test_small_groups_share_a_row() -> None:
    """As long as the row has places, and the captions are no wider than their pictures."""
    groups = [Group("a", (_png(RED),) * 2), Group("b", (_png(GREEN),)), Group("c" * 60, (_png(BLUE),))]
    sheet = draw_sheet([("Title", groups)])
    rows = {colour: _rows_of(sheet, colour) for colour in (RED, GREEN, BLUE)}
    assert rows[RED] == rows[GREEN]
    assert max(rows[RED]) < min(rows[BLUE])


def _rows_of(sheet: Image.Image, colour: tuple[int, int, int]) -> set[int]:
    return {y for y in range(sheet.height) for x in range(0, sheet.width, 50) if sheet.getpixel((x, y)) == colour}


def test_thumbnail_shows_before_and_after() -> None:
    """The first picture of the first and of the last group, side by side; one group gives one picture."""
    groups = [Group("a", (_png(RED), _png(WHITE))), Group("b", (_png(WHITE),)), Group("c", (_png(BLUE),))]
    thumbnail = draw_thumbnail(groups)
    middle = thumbnail.height // 2
    assert thumbnail.getpixel((middle, middle)) == RED
    assert thumbnail.getpixel((thumbnail.width - middle, middle)) == BLUE
    assert draw_thumbnail(groups[2:]).getcolors() == [(middle * 2 * middle * 2, BLUE)]


def test_thumbnail_ends_with_the_last_after() -> None:
    """What looks inside a run may come last."""
    groups = [Group("Before", (_png(RED),)), Group("After: more", (_png(BLUE),)), Group("Inside", (_png(GREEN),))]
    thumbnail = draw_thumbnail(groups)
    middle = thumbnail.height // 2
    assert thumbnail.getpixel((thumbnail.width - middle, middle)) == BLUE


def test_a_grid_is_shown_large() -> None:
    """A lone picture that is no square keeps its size, up to the sheet's width; what follows stands below it."""
    for size, shown in (((300, 400), (300, 400)), ((2000, 500), (804, 201))):
        sheet = draw_sheet([("Inside", [Group("Maps", (_png(GREEN, *size),)), Group("After", (_png(BLUE),))])])
        rows = [sheet.getpixel((20, y)) for y in range(sheet.height)]
        top = rows.index(GREEN)
        columns = [sheet.getpixel((x, top)) for x in range(sheet.width)]
        assert (columns.count(GREEN), rows.count(GREEN)) == shown
        assert rows.index(BLUE) > top + shown[1]


def test_fit_keeps_the_shape() -> None:
    """A wide picture is scaled as a whole, with paper above and below it."""
    square = fit(_png(RED, 40, 10), 80)
    assert square.size == (80, 80)
    assert [square.getpixel((40, y)) for y in (0, 28, 32, 48, 52, 79)] == [WHITE, WHITE, RED, RED, WHITE, WHITE]


def test_groups_follow_the_canvas(server: Server, solid_workflow: dict[str, Any]) -> None:
    """Output nodes count from left to right and then downwards, whatever their ids; titles are captions."""
    nodes, links = solid_workflow["nodes"], solid_workflow["links"]
    for number, (title, place) in enumerate({"Last": [300, 50], "First": [200, 90]}.items(), start=3):
        nodes.append(nodes[1] | {"id": number, "title": title, "pos": place, "widgets_values": [f"group_{number}"]})
        nodes[-1]["inputs"] = [{"name": "images", "type": "IMAGE", "link": number}]
        nodes[0]["outputs"][0]["links"].append(number)
        links.append([number, 1, 0, number, 0, "IMAGE"])
    outputs = server.queue(server.to_api(solid_workflow))
    groups = fetch_groups(server, solid_workflow, outputs)
    assert [group.caption for group in groups] == ["First", "Red", "Last"]
    assert all(len(group.pictures) == 2 for group in groups)


def test_no_picture_is_an_error(server: Server, solid_workflow: dict[str, Any]) -> None:
    """A run whose outputs hold no picture is not passed over in silence."""
    with pytest.raises(WorkflowError, match="gave no picture"):
        fetch_groups(server, solid_workflow, {"1": {"text": ["x"]}})


def test_every_workflow_has_a_picture_in_templates() -> None:
    """The host looks for it beside the file. One of a workflow for a real model is another's, and says so."""
    borrowed = borrowed_pictures()
    drawn = {path.with_suffix(".jpg") for path in complete_workflows()}
    pictures = {*FOLDER.glob("*.jpg")}
    assert pictures == {path.with_suffix(".jpg") for path in FOLDER.glob("*.json")} == drawn | {*borrowed}
    for path, given in borrowed.items():
        assert given in drawn
        with Image.open(path) as shown, Image.open(given) as nearest:
            wanted = draw_borrowed(nearest)
            assert shown.size == wanted.size
            other = ImageChops.difference(shown, wanted)
            # By itself: over the whole picture a line that is not there is hardly anything.
            line = (0, wanted.height - 27, *wanted.size)
            assert max(max(ImageStat.Stat(part).mean) for part in (other, other.crop(line))) < 4, path
    written = wanted.crop(line)
    assert written.getcolors() != [(written.width * written.height, WHITE)]
