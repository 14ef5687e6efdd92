"""The contact sheet: every picture of a demo run under its caption, one block a workflow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_SIDE = 192
_GAP = 12
_COLUMNS = 4
_WIDTH = _COLUMNS * (_SIDE + _GAP) - _GAP
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
    drawn = [(title, [(group.caption, _tiles(group)) for group in groups]) for title, groups in blocks]
    height = _GAP + sum(_block_height(groups) for _, groups in drawn)
    sheet = Image.new("RGB", (_WIDTH + 2 * _GAP, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    y = _GAP
    for title, groups in drawn:
        draw.text((_GAP, y), title, _INK, ImageFont.load_default(_TITLE_SIZE))
        y += _TITLE_SIZE + _GAP
        for caption, tiles in groups:
            draw.text((_GAP, y), caption, _FAINT, ImageFont.load_default(_CAPTION_SIZE))
            y += _CAPTION_SIZE + _GAP
            for number, tile in enumerate(tiles):
                row, column = divmod(number, _COLUMNS)
                sheet.paste(tile, (_GAP + column * (_SIDE + _GAP), y + row * (_SIDE + _GAP)))
            y += _tiles_height(tiles)
    return sheet


def draw_thumbnail(groups: Sequence[Group]) -> Image.Image:
    """The first picture of the first group and of the last "After" one (without any, of the last) side by side; one
    picture if there is one group."""
    after = [group for group in groups if group.caption.startswith("After")] or groups
    chosen = [groups[0], after[-1]] if len(groups) > 1 else [groups[0]]
    pictures = [fit(group.pictures[0], 2 * _SIDE) for group in chosen]
    thumbnail = Image.new("RGB", (2 * _SIDE * len(pictures), 2 * _SIDE), _PAPER)
    for number, picture in enumerate(pictures):
        thumbnail.paste(picture, (number * 2 * _SIDE, 0))
    return thumbnail


def fit(picture: bytes, side: int) -> Image.Image:
    """The picture scaled to fit a white square of `side` pixels, in its middle."""
    image = _scaled(_opened(picture), side, side)
    square = Image.new("RGB", (side, side), _PAPER)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _opened(picture: bytes) -> Image.Image:
    with Image.open(io.BytesIO(picture)) as opened:
        return opened.convert("RGB")


def _scaled(image: Image.Image, width: int, height: int) -> Image.Image:
    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _tiles(group: Group) -> list[Image.Image]:
    # A lone picture that is no square is one to read, such as a grid of maps.
    first = _opened(group.pictures[0])
    if len(group.pictures) == 1 and first.width != first.height:
        return [_scaled(first, min(first.width, _WIDTH), first.height)]
    return [fit(picture, _SIDE) for picture in group.pictures]


def _tiles_height(tiles: Sequence[Image.Image]) -> int:
    return -(-len(tiles) // _COLUMNS) * (tiles[0].height + _GAP)


def _block_height(groups: Sequence[tuple[str, Sequence[Image.Image]]]) -> int:
    return _TITLE_SIZE + _GAP + sum(_CAPTION_SIZE + _GAP + _tiles_height(tiles) for _, tiles in groups)
