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
# What a workflow's picture says that another one gave.
BORROWED = "made with the pack's small model"
_BORROWED_HEIGHT = 240
_PAPER, _INK, _FAINT = "#ffffff", "#111111", "#666666"
# A group's caption and its pictures as they are drawn.
_Tiled = tuple[str, list[Image.Image]]


@dataclass(frozen=True)
class Group:
    """The pictures of one output node: PNG files as bytes, and the node's title as their caption."""

    caption: str
    pictures: tuple[bytes, ...]


def draw_sheet(blocks: Sequence[tuple[str, Sequence[Group]]]) -> Image.Image:
    """One picture of all `blocks`, each the title of a workflow and its groups in reading order, side by side where
    they fit into a row with their captions."""
    drawn = [(title, _lines([(group.caption, _tiles(group)) for group in groups])) for title, groups in blocks]
    height = _GAP + sum(_block_height(lines) for _, lines in drawn)
    sheet = Image.new("RGB", (_WIDTH + 2 * _GAP, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    y = _GAP
    for title, lines in drawn:
        draw.text((_GAP, y), title, _INK, ImageFont.load_default(_TITLE_SIZE))
        y += _TITLE_SIZE + _GAP
        for line in lines:
            first = 0
            for caption, tiles in line:
                place = (_GAP + first * (_SIDE + _GAP), y)
                draw.text(place, caption, _FAINT, ImageFont.load_default(_CAPTION_SIZE))
                for number, tile in enumerate(tiles, start=first):
                    row, column = divmod(number, _COLUMNS)
                    top = y + _CAPTION_SIZE + _GAP + row * (_SIDE + _GAP)
                    sheet.paste(tile, (_GAP + column * (_SIDE + _GAP), top))
                first += len(tiles)
            y += _line_height(line)
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


def draw_borrowed(thumbnail: Image.Image) -> Image.Image:
    """A thumbnail for another workflow than the one that gave it, smaller, and with a line that says what made it, in
    the middle, as the page may crop its sides."""
    image = _scaled(thumbnail, 2 * _BORROWED_HEIGHT, _BORROWED_HEIGHT)
    font = ImageFont.load_default(_CAPTION_SIZE)
    sheet = Image.new("RGB", (image.width, image.height + _CAPTION_SIZE + _GAP), _PAPER)
    sheet.paste(image)
    place = ((sheet.width - font.getlength(BORROWED)) / 2, image.height + _GAP / 2 - 2)
    ImageDraw.Draw(sheet).text(place, BORROWED, _FAINT, font)
    return sheet


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


def _lines(groups: Sequence[_Tiled]) -> list[list[_Tiled]]:
    lines: list[list[_Tiled]] = []
    for group in groups:
        line = [*lines[-1], group] if lines else []
        if line and sum(len(tiles) for _, tiles in line) <= _COLUMNS and all(map(_is_narrow, line)):
            lines[-1] = line
        else:
            lines.append([group])
    return lines


def _is_narrow(group: _Tiled) -> bool:
    """Whether a group's caption is no wider than its tiles, each of which fills one place."""
    caption, tiles = group
    font = ImageFont.load_default(_CAPTION_SIZE)
    return tiles[0].size == (_SIDE, _SIDE) and font.getlength(caption) < len(tiles) * (_SIDE + _GAP)


def _line_height(line: Sequence[_Tiled]) -> int:
    tiles = [tile for _, each in line for tile in each]
    return _CAPTION_SIZE + _GAP + -(-len(tiles) // _COLUMNS) * (tiles[0].height + _GAP)


def _block_height(lines: Sequence[Sequence[_Tiled]]) -> int:
    return _TITLE_SIZE + _GAP + sum(map(_line_height, lines))
