"""LAYOUT: where in the picture which phrases belong, made of boxes and masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..parts.prompt import canonical


@dataclass(frozen=True, eq=False)
class Region:
    """A phrase of the prompt and the part of the canvas where it belongs: `mask` (height, width) bool."""

    phrase: str
    mask: Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """Regions on a canvas of `width` by `height` pixels, which stands for the whole picture whatever its size.

    A phrase may have several regions, and regions may overlap."""

    width: int
    height: int
    regions: tuple[Region, ...] = ()

    @property
    def phrases(self) -> tuple[str, ...]:
        """Its phrases as `canonical` writes them, each once."""
        return tuple(dict.fromkeys(canonical(region.phrase) for region in self.regions))

    def shown(self) -> dict[str, Tensor]:
        """For each phrase, as `canonical` writes it, all of its regions together: (height, width) bool."""
        found: dict[str, Tensor] = {}
        for region in self.regions:
            name = canonical(region.phrase)
            found[name] = found[name] | region.mask if name in found else region.mask
        return found


@dataclass(frozen=True)
class Box:
    """A box in pixels of the canvas, not yet checked, and what it says it holds ("" if nothing)."""

    x: float
    y: float
    width: float
    height: float
    phrase: str = ""


def boxes_of(value: Any, width: int, height: int) -> list[Box]:
    """The boxes in a value of the host's BOUNDING_BOX link, or of its box editor's `elements`.

    The host passes one box as a dictionary, several as a list, and those of a batch of pictures as a list of lists. A
    box has x, y, width and height in pixels; its phrase is the description in its metadata, or its label where a
    detector gave it one. An element has a bbox of ymin, xmin, ymax, xmax in thousandths of the canvas, and a desc.

    Raises ValueError when the value is neither, or holds the boxes of several pictures."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"The boxes are a {type(value).__name__}; connect bounding boxes, or the editor's elements.")
    if value and all(isinstance(frame, Sequence) and not isinstance(frame, str) for frame in value):
        if len(value) > 1:
            raise ValueError(f"The boxes are those of {len(value)} pictures; a layout takes the boxes of one.")
        value = value[0]
    return [_box(item, number, width, height) for number, item in enumerate(value, 1)]


def _box(item: Any, number: int, width: int, height: int) -> Box:
    try:
        if "bbox" in item:
            y0, x0, y1, x1 = (float(edge) / 1000 for edge in item["bbox"])
            sides = (round(x0 * width), round(y0 * height), round(x1 * width), round(y1 * height))
            place = (sides[0], sides[1], sides[2] - sides[0], sides[3] - sides[1])
        else:
            place = tuple(float(item[name]) for name in ("x", "y", "width", "height"))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(
            f"Box {number} is {item!r}; a box needs the numbers x, y, width and height, an element a bbox of four."
        ) from None
    metadata = item.get("metadata")
    described = metadata.get("desc") if isinstance(metadata, Mapping) else None
    phrase = described or item.get("desc") or item.get("label") or ""
    return Box(*place, str(phrase).strip())


def box_mask(box: Box, width: int, height: int, name: str) -> Tensor:
    """The pixels of a canvas that lie in a box, (height, width) bool; what lies outside the canvas is cut off. Edges
    between pixels are rounded to the nearest, but a box of any area keeps at least one pixel.

    Raises ValueError, calling the box `name`, when it has no area or lies wholly outside the canvas."""
    numbers = (box.x, box.y, box.width, box.height)
    if not all(math.isfinite(number) for number in numbers) or box.width <= 0 or box.height <= 0:
        raise ValueError(f"{name} is {box.width:g} wide and {box.height:g} high; draw it with some area.")
    x0, x1 = _pixels(box.x, box.width, width)
    y0, y1 = _pixels(box.y, box.height, height)
    if x0 >= x1 or y0 >= y1:
        raise ValueError(
            f"{name} at x {box.x:g}, y {box.y:g}, {box.width:g} wide and {box.height:g} high, lies outside the canvas "
            f"of {width} x {height}; give the canvas the size that the boxes were drawn on."
        )
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def _pixels(start: float, length: float, limit: int) -> tuple[int, int]:
    first = round(start)
    return max(first, 0), min(max(round(start + length), first + 1), limit)


def painted_mask(mask: Tensor, width: int, height: int, name: str) -> Tensor:
    """A mask (h, w) of 0 to 1, any size, stretched to the canvas: (height, width) bool, inside where it is above one
    half.

    Raises ValueError, calling the mask `name`, when it is nowhere above one half."""
    if not bool((mask > 0.5).any()):
        raise ValueError(
            f"{name} is empty: no place of its {mask.shape[1]} x {mask.shape[0]} is above one half; paint white where "
            "the phrase belongs."
        )
    # From a larger mask, a pixel of the canvas is inside if any of what it stands for is: thin strokes stay.
    inside = (mask > 0.5).float()[None, None]
    return torch.nn.functional.adaptive_max_pool2d(inside, (height, width))[0, 0] > 0


def layout_picture(layout: Layout) -> Tensor:
    """A picture (1, height, width, 3) of 0 to 1: each phrase's regions in a colour of its own, overlaps mixed, and the
    phrase in their middle."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    shown = layout.shown()
    names = {canonical(region.phrase): region.phrase for region in layout.regions}
    colours = torch.zeros(layout.height, layout.width, 3)
    count = torch.zeros(layout.height, layout.width, 1)
    for number, mask in enumerate(shown.values()):
        colours += mask[..., None] * torch.tensor(_colour(number))
        count += mask[..., None]
    pixels = torch.where(count > 0, colours / count.clamp(min=1), torch.full((3,), 0.12))
    picture = Image.fromarray((pixels * 255).round().byte().numpy())
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(10, min(layout.width, layout.height) // 18))
    for region in layout.regions:
        rows, columns = region.mask.nonzero(as_tuple=True)
        middle = (float(columns.float().mean()), float(rows.float().mean()))
        name = names[canonical(region.phrase)]
        pen.text(middle, name, fill=(255, 255, 255), font=font, anchor="mm", stroke_width=2, stroke_fill=(0, 0, 0))
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]


def _colour(number: int) -> tuple[float, float, float]:
    """Colours that stay apart however many there are: hues a golden section apart."""
    import colorsys

    return colorsys.hsv_to_rgb((0.58 + number * 0.618034) % 1.0, 0.65, 0.8)
