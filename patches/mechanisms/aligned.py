"""A reference picture put where a subject stands in another picture: scaled and moved, its surroundings kept or not.

Features are matched by likeness, and a detail is like itself at one scale only: what MasaCtrl and Layout-and-Retouch
swap fits where the subject is about as large as it is to be, in about the same place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# What stands where a background is removed, of 0 to 1.
SHADES = {"white": 1.0, "gray": 0.5}


class Box(NamedTuple):
    """x0, y0, x1, y1 in pixels, the last two exclusive."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def width(self) -> float:
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        return self.y1 - self.y0


def without_background(image: Tensor, mask: Tensor, shade: float) -> Tensor:
    """A picture (n, height, width, 3) that is one shade outside a mask (n, height, width) of 0 to 1."""
    inside = mask[..., None].to(image)
    return image * inside + shade * (1 - inside)


def filled_box(height: int, width: int, margin: float) -> Box:
    """The box in the middle of a picture that leaves `margin`, a share of each side, free on each side."""
    return Box(margin * width, margin * height, (1 - margin) * width, (1 - margin) * height)


def scale_of(subject: Box, place: Box, within: bool) -> float:
    """By how much to enlarge a subject for a place: so that it lies `within` it, or is as large as it (the geometric
    mean of what its width and its height would need)."""
    sides = (place.width / subject.width, place.height / subject.height)
    return min(sides) if within else (sides[0] * sides[1]) ** 0.5


def aligned(
    image: Tensor, mask: Tensor, subject: Box, place: Box, size: tuple[int, int], within: bool = False
) -> tuple[Tensor, Tensor]:
    """One picture (1, h, w, 3) and the mask of its subject (1, h, w), scaled alike in both directions and moved so that
    the middle of `subject` comes to that of `place` on a canvas of `size` (height, width): (1, *size, 3), (1, *size).
    Beyond the picture's edge the picture goes on as its edge is, and the mask is 0. See `scale_of` for `within`."""
    scale = scale_of(subject, place, within)
    height, width = (max(round(side * scale), 1) for side in image.shape[1:3])
    planes = torch.cat([image.movedim(-1, 1), mask[:, None].to(image)], 1)
    # What was rounded is shared by both sides.
    down, across = height / image.shape[1], width / image.shape[2]
    left = round((place.x0 + place.x1 - (subject.x0 + subject.x1) * across) / 2)
    top = round((place.y0 + place.y1 - (subject.y0 + subject.y1) * down) / 2)
    rows, columns = torch.arange(size[0]) - top, torch.arange(size[1]) - left
    places = (rows.clamp(0, height - 1), columns.clamp(0, width - 1))
    placed = _resized(planes, (height, width), *places).clamp(0, 1)
    known = ((rows >= 0) & (rows < height))[:, None] & (columns >= 0) & (columns < width)
    return placed[:, :-1].movedim(1, -1), placed[:, -1] * known.to(placed.device)


def _resized(planes: Tensor, size: tuple[int, int], rows: Tensor, columns: Tensor) -> Tensor:
    """These rows and columns of planes (1, n, h, w) that are resized to `size` (height, width), bicubic. Where they
    grow no others are made: all of a large picture whose subject is small would be gigabytes."""
    if size[0] < planes.shape[2] or size[1] < planes.shape[3]:
        planes = functional.interpolate(planes, size, mode="bicubic", antialias=True)
        return planes[:, :, rows][..., columns]
    # Where pixels of the resized planes lie among those of the given ones.
    down, across = (
        (wanted.double() + 0.5) * given / whole - 0.5
        for wanted, given, whole in zip((rows, columns), planes.shape[2:], size, strict=True)
    )
    return _cubic(_cubic(planes, across).mT, down).mT


def _cubic(planes: Tensor, places: Tensor) -> Tensor:
    """Planes (..., w) between their columns, at `places` (n,) in pixels: (..., n), by the cubic of torch's own bicubic
    (a = -0.75). Beyond the edge they go on as the edge is."""
    first, made = places.floor().long(), torch.zeros((), device=planes.device)
    for column in (first - 1, first, first + 1, first + 2):
        away = (places - column).abs()
        near = (1.25 * away - 2.25) * away.square() + 1
        far = -0.75 * (((away - 5) * away + 8) * away - 4)
        weight = torch.where(away <= 1, near, far).to(planes)
        made = made + weight * planes[..., column.clamp(0, planes.shape[-1] - 1)]
    return made
