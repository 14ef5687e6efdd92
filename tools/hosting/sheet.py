"""The contact sheet: every picture of a demo run under its caption, one block a workflow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_SIDE = 192
_GAP = 12
_COLUMNS = 4
_TITLE_SIZE = 22
_CAPTION_SIZE = 15
_PAPER, _INK, _FAINT = "#ffffff", "#111111", "#666666"


@dataclass(frozen=True)
class Group:
    """The pictures of one output node: PNG files as bytes, and the node's title as their caption."""

    caption: str
    pictures: tuple[bytes, ...]


def draw_sheet(blocks: Sequence[tuple[str, Sequence[Group]]]) -> Image.Image:
    """One picture of all `blocks`, each the title of a workflow and its groups in reading order."""
    width = _GAP + _COLUMNS * (_SIDE + _GAP)
    height = _GAP + sum(_block_height(groups) for _, groups in blocks)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    y = _GAP
    for title, groups in blocks:
        draw.text((_GAP, y), title, _INK, ImageFont.load_default(_TITLE_SIZE))
        y += _TITLE_SIZE + _GAP
        for group in groups:
            draw.text((_GAP, y), group.caption, _FAINT, ImageFont.load_default(_CAPTION_SIZE))
            y += _CAPTION_SIZE + _GAP
            for number, picture in enumerate(group.pictures):
                row, column = divmod(number, _COLUMNS)
                place = (_GAP + column * (_SIDE + _GAP), y + row * (_SIDE + _GAP))
                sheet.paste(fit(picture, _SIDE), place)
            y += _rows(group) * (_SIDE + _GAP)
    return sheet


def draw_thumbnail(groups: Sequence[Group]) -> Image.Image:
    """The first picture of each of the first and the last group, side by side; one picture if there is one group."""
    chosen = [groups[0], groups[-1]] if len(groups) > 1 else [groups[0]]
    pictures = [fit(group.pictures[0], 2 * _SIDE) for group in chosen]
    thumbnail = Image.new("RGB", (2 * _SIDE * len(pictures), 2 * _SIDE), _PAPER)
    for number, picture in enumerate(pictures):
        thumbnail.paste(picture, (number * 2 * _SIDE, 0))
    return thumbnail


def fit(picture: bytes, side: int) -> Image.Image:
    """The picture scaled to fit a white square of `side` pixels, in its middle."""
    with Image.open(io.BytesIO(picture)) as opened:
        image = opened.convert("RGB")
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    square = Image.new("RGB", (side, side), _PAPER)
    square.paste(image.resize(size, Image.Resampling.LANCZOS), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def _rows(group: Group) -> int:
    return -(-len(group.pictures) // _COLUMNS)


def _block_height(groups: Sequence[Group]) -> int:
    pictures = sum(_CAPTION_SIZE + _GAP + _rows(group) * (_SIDE + _GAP) for group in groups)
    return _TITLE_SIZE + _GAP + pictures
