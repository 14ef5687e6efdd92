"""Signed distances of the toy world's shapes.

Every function takes coordinates (u, v) with v pointing down, in units of the shape's radius, and gives the
signed distance to its edge in the same units: negative inside, zero on the edge. Corners are those of the
half-planes that meet there, which is all that anti-aliasing needs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
SignedDistance = Callable[[Field, Field], Field]


def _box(u: Field, v: Field, half_width: float, half_height: float) -> Field:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _disc(u: Field, v: Field, radius: float, u0: float = 0.0, v0: float = 0.0) -> Field:
    return np.hypot(u - u0, v - v0) - radius


def _polygon(u: Field, v: Field, sides: int, inner_radius: float, turn: float) -> Field:
    angles = turn + np.arange(sides) * (2 * np.pi / sides)
    planes = [u * np.float32(np.cos(a)) + v * np.float32(np.sin(a)) for a in angles]
    return np.maximum.reduce(planes) - np.float32(inner_radius)


def circle(u: Field, v: Field) -> Field:
    return _disc(u, v, 0.95)


def square(u: Field, v: Field) -> Field:
    return _box(u, v, 0.82, 0.82)


def triangle(u: Field, v: Field) -> Field:
    return _polygon(u, v - 0.15, 3, 0.55, np.pi / 2)


def star(u: Field, v: Field) -> Field:
    sector = 2 * np.pi / 5
    angle = np.arctan2(v, u) + np.pi / 2
    folded = np.abs((angle + sector / 2) % sector - sector / 2)
    radius = np.hypot(u, v)
    tip, notch = 1.05, 0.47
    notch_x, notch_y = notch * np.cos(sector / 2), notch * np.sin(sector / 2)
    length = np.hypot(notch_x - tip, notch_y)
    return ((radius * np.cos(folded) - tip) * notch_y + radius * np.sin(folded) * (tip - notch_x)) / np.float32(length)


def heart(u: Field, v: Field) -> Field:
    v = v + 0.05
    half, root = 0.6, np.float32(np.sqrt(0.5))
    turned = _box((u + v - 0.2) * root, (v - u - 0.2) * root, half, half)
    lobe_u, lobe_v = half * root, 0.2 - half * root
    return np.minimum(turned, np.minimum(_disc(u, v, half, lobe_u, lobe_v), _disc(u, v, half, -lobe_u, lobe_v)))


def ring(u: Field, v: Field) -> Field:
    return np.abs(np.hypot(u, v) - 0.7) - 0.27


def cross(u: Field, v: Field) -> Field:
    return np.minimum(_box(u, v, 0.95, 0.34), _box(u, v, 0.34, 0.95))


def moon(u: Field, v: Field) -> Field:
    return np.maximum(_disc(u, v, 0.98), -_disc(u, v, 0.8, 0.55, 0.0))


def arrow(u: Field, v: Field) -> Field:
    shaft = _box(u + 0.4, v, 0.55, 0.26)
    root = np.float32(np.sqrt(0.5))
    head = np.maximum(-(u - 0.05), (np.abs(v) + u - 1.0) * root)
    return np.minimum(shaft, head)


def hexagon(u: Field, v: Field) -> Field:
    return _polygon(u, v, 6, 0.88, np.pi / 2)


def shield(u: Field, v: Field) -> Field:
    point = np.maximum(_disc(u, v, 1.35, 0.55, -0.35), _disc(u, v, 1.35, -0.55, -0.35))
    return np.maximum(point, -(v + 0.85))


def plaque(u: Field, v: Field) -> Field:
    corner = 0.3
    du, dv = np.abs(u) - 0.85 + corner, np.abs(v) - 0.85 + corner
    return np.hypot(np.maximum(du, 0), np.maximum(dv, 0)) + np.minimum(np.maximum(du, dv), 0) - corner


SHAPES: dict[str, SignedDistance] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "heart": heart,
    "ring": ring,
    "cross": cross,
    "moon": moon,
    "arrow": arrow,
}

PLATES: dict[str, SignedDistance] = {"disc": circle, "hexagon": hexagon, "shield": shield, "plaque": plaque}
