"""Draws the toy world's scenes: pure functions of a scene, anti-aliased, about a millisecond each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .scenes import COLOURS, GLYPH_CELLS, LIGHT, SIZE, Background, Scene, Thing
from .shapes import PLATES, SHAPES, Field


@dataclass(frozen=True)
class Picture:
    """A drawn scene: image (128, 128, 3) uint8; masks (n, 128, 128) bool; boxes (n, 4) as x0, y0, x1, y1
    in pixels, the last two exclusive; rows in the order of `scene.things`."""

    scene: Scene
    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    boxes: NDArray[np.int64] = field(repr=False)


def _interpolation(cells: int) -> Field:
    position = np.arange(SIZE) * (cells - 1) / SIZE
    low = np.floor(position).astype(int)
    fraction = (position - low).astype(np.float32)
    matrix = np.zeros((SIZE, cells), dtype=np.float32)
    rows = np.arange(SIZE)
    matrix[rows, low] += 1 - fraction
    matrix[rows, low + 1] += fraction
    return matrix


_UPSAMPLE = {cells: _interpolation(cells) for cells in (5, 9, 17, 33)}
_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + np.float32(0.5)


def _noise(rng: np.random.Generator, rows: int, columns: int) -> Field:
    grid = rng.standard_normal((rows, columns)).astype(np.float32)
    return _UPSAMPLE[rows] @ grid @ _UPSAMPLE[columns].T


def _mix(first: Field, second: Field, amount: Field) -> Field:
    return first + (second - first) * amount[..., None]


def _rgb(colour: str | tuple[int, int, int]) -> Field:
    return np.asarray(COLOURS[colour] if isinstance(colour, str) else colour, dtype=np.float32)


def _draw_background(background: Background, rng: np.random.Generator) -> Field:
    canvas = np.empty((SIZE, SIZE, 3), dtype=np.float32)
    if background.kind == "plain":
        canvas[:] = _rgb(background.colours[0])
    elif background.kind == "gradient":
        canvas[:] = _mix(_rgb(background.colours[0]), _rgb(background.colours[1]), _Y / SIZE)
    elif background.kind == "grass":
        blades = 0.5 + 0.22 * _noise(rng, 9, 33) + 0.12 * _noise(rng, 17, 17)
        canvas[:] = _mix(_rgb((58, 104, 30)), _rgb((140, 188, 72)), np.clip(blades, 0, 1))
    elif background.kind == "sky":
        clouds = np.clip(0.9 * _noise(rng, 9, 5) + 0.25 * _noise(rng, 17, 9) - 0.25, 0, 1)
        canvas[:] = _mix(_mix(_rgb((96, 158, 226)), _rgb((176, 212, 244)), _Y / SIZE), _rgb((250, 251, 253)), clouds)
    elif background.kind == "brick":
        row = np.floor(_Y / 16)
        along = (_X + 16 * (row % 2)) % 32
        mortar = (_Y % 16 < 2.5) | (along < 2.5)
        shade = 0.5 + 0.2 * _noise(rng, 9, 5)
        canvas[:] = _mix(_rgb((142, 66, 50)), _rgb((186, 100, 78)), np.clip(shade, 0, 1))
        canvas[mortar] = _rgb((206, 198, 186))
    elif background.kind == "sand":
        grain = 0.5 + 0.14 * _noise(rng, 33, 33) + 0.25 * _noise(rng, 5, 5)
        canvas[:] = _mix(_rgb((206, 176, 122)), _rgb((240, 220, 172)), np.clip(grain, 0, 1))
    else:
        phase = (_Y + 3 * np.sin(_X / 9 + rng.uniform(0, 6)) + 2 * _noise(rng, 5, 5)) * np.float32(2 * np.pi / 18)
        canvas[:] = _mix(_rgb((24, 98, 140)), _rgb((84, 176, 198)), 0.5 + 0.5 * np.sin(phase))
    return canvas


def second_tone(colour: str) -> Field:
    """The other tone of a colour's texture: a lighter one for dark colours, a darker one for light colours."""
    rgb = _rgb(colour)
    return rgb * 0.52 if colour in LIGHT else rgb + (255 - rgb) * 0.62


def _texture(name: str, u: Field, v: Field, radius: float) -> Field:
    """Share of the second tone at (u, v) in radii. Periods in pixels stay at 11 or more: finer ones do not
    survive an autoencoder that shrinks eight times."""
    period = max(11.0, 0.5 * radius)
    x, y, soft = u * radius, v * radius, 1.2
    if name == "striped":
        distance = np.abs((x + y) * np.float32(np.sqrt(0.5)) % period - period / 2) - period / 4
    elif name == "dotted":
        distance = (
            np.hypot((x + period / 2) % period - period / 2, (y + period / 2) % period - period / 2) - period * 0.3
        )
    elif name == "checkered":
        wave = np.sin(x * np.float32(np.pi / period)) * np.sin(y * np.float32(np.pi / period))
        distance = wave * np.float32(period / np.pi)
    else:
        return np.zeros_like(u)
    return np.clip(0.5 - distance / soft, 0, 1)


def _glyph(cells: Sequence[bool], u: Field, v: Field) -> Field:
    """Share of the glyph's colour: the cells, interpolated and thresholded, so neighbours melt into strokes."""
    grid = np.zeros((GLYPH_CELLS + 2, GLYPH_CELLS + 2), dtype=np.float32)
    grid[1:-1, 1:-1] = np.reshape(np.asarray(cells, dtype=np.float32), (GLYPH_CELLS, GLYPH_CELLS))
    step = 1.24 / GLYPH_CELLS
    column = np.clip(u / step + (GLYPH_CELLS + 1) / 2, 0, GLYPH_CELLS + 0.999)
    row = np.clip(v / step + (GLYPH_CELLS + 1) / 2, 0, GLYPH_CELLS + 0.999)
    c0, r0 = column.astype(int), row.astype(int)
    fc, fr = column - c0, row - r0
    top = grid[r0, c0] * (1 - fc) + grid[r0, c0 + 1] * fc
    bottom = grid[r0 + 1, c0] * (1 - fc) + grid[r0 + 1, c0 + 1] * fc
    return np.clip(0.5 + (top * (1 - fr) + bottom * fr - 0.45) * 4, 0, 1)


def _draw_thing(canvas: Field, thing: Thing) -> NDArray[np.bool_]:
    reach = thing.radius * 1.25 + 3
    x0, x1 = max(int(thing.x - reach), 0), min(int(thing.x + reach) + 1, SIZE)
    y0, y1 = max(int(thing.y - reach), 0), min(int(thing.y + reach) + 1, SIZE)
    dx, dy = _X[y0:y1, x0:x1] - thing.x, _Y[y0:y1, x0:x1] - thing.y
    cos, sin = np.float32(np.cos(thing.angle)), np.float32(np.sin(thing.angle))
    u, v = (dx * cos + dy * sin) / thing.radius, (dy * cos - dx * sin) / thing.radius
    window = canvas[y0:y1, x0:x1]
    if thing.emblem is None:
        distance = SHAPES[thing.shape](u, v) * thing.radius
        fill = _mix(_rgb(thing.colour), second_tone(thing.colour), _texture(thing.texture, u, v, thing.radius))
    else:
        distance = PLATES[thing.emblem.plate](u, v) * thing.radius
        fill = _mix(_rgb(thing.emblem.plate_colour), _rgb(thing.emblem.glyph_colour), _glyph(thing.emblem.cells, u, v))
    outline = np.clip(distance + 2.0, 0, 1)
    fill = _mix(fill, _rgb((18, 18, 22)), outline)
    window[:] = _mix(window, fill, np.clip(0.5 - distance, 0, 1))
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[y0:y1, x0:x1] = distance < 0
    return mask


def draw(scene: Scene) -> Picture:
    """Draws a scene, the things in order, later ones on top. Pure: the same scene gives the same bytes."""
    canvas = _draw_background(scene.background, np.random.default_rng(scene.seed))
    masks = np.stack([_draw_thing(canvas, thing) for thing in scene.things])
    for above in range(1, len(masks)):
        masks[:above] &= ~masks[above]
    return Picture(scene, np.clip(canvas + 0.5, 0, 255).astype(np.uint8), masks, np.stack([mask_box(m) for m in masks]))


def mask_box(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The box x0, y0, x1, y1 (the last two exclusive) around a mask of shape (h, w); zeros when it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if rows.size == 0:
        return np.zeros(4, dtype=np.int64)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
