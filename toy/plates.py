"""Whether a drawn emblem's plate is a plate: a rule, no network, so that it cannot share a model's taste for blobs.

Every thing of the toy world has a dark outline. The outlines of the four plates are laid over a picture at many sizes,
turns and places around a box, and the best one's share of points where the picture really goes dark, from the ground
inwards, says how much of a plate is there. Grounds must be lighter than an outline: the textured ones are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .shapes import PLATES

POINTS = 48
ANGLES = tuple(np.linspace(-0.45, 0.45, 9))
SCALES = (0.9, 0.95, 1.0, 1.05, 1.1)
SHIFTS = (-2.0, 0.0, 2.0)
# Pixels from the outline, outwards: where it must be dark, and where the ground is.
LINE, GROUND = (-1.5, -0.5, 0.5), 3.5
# How much darker than the ground, of 255: what the autoencoder leaves of the outline on dark water.
FALL = 20.0
# The share of an outline's points from which on it is a plate's. Of 60 emblems 98% reach it as drawn and 90% through
# the autoencoder; of 24 drawn hearts and moons one, and none through the autoencoder.
ENOUGH = 0.85

Points = NDArray[np.float32]


@cache
def outline(plate: str) -> tuple[Points, Points]:
    """Points on a plate's edge and the unit normals there, outwards: two of (POINTS, 2), in radii."""
    distance = PLATES[plate]
    turn = np.arange(POINTS) * (2 * np.pi / POINTS)
    rays = np.stack([np.cos(turn), np.sin(turn)], 1).astype(np.float32)
    low, high = np.zeros(POINTS, np.float32), np.full(POINTS, 1.5, np.float32)
    for _ in range(20):
        middle = (low + high) / 2
        inside = distance(*(rays * middle[:, None]).T) < 0
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    points, small = rays * low[:, None], np.float32(0.01)
    u, v = points.T
    slope = np.stack([distance(u + small, v) - distance(u - small, v), distance(u, v + small) - distance(u, v - small)])
    normals = slope.T / np.linalg.norm(slope.T, axis=1, keepdims=True)
    return points, normals.astype(np.float32)


def fit(image: NDArray[np.float32], box: Sequence[float]) -> tuple[str, float]:
    """The plate whose outline lies best around a box (x0, y0, x1, y1) of a picture (h, w, 3) of 0 to 1, and the share
    of its points that lie on a dark edge."""
    grey = image.mean(2) * 255
    x0, y0, x1, y1 = box
    shifts = np.array([(x, y) for x in SHIFTS for y in SHIFTS], np.float32)
    best = ("", 0.0)
    for plate in PLATES:
        points, normals = outline(plate)
        for angle in ANGLES:
            turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], np.float32)
            edge, out = points @ turn, normals @ turn
            low, high = edge.min(0), edge.max(0)
            radius = ((x1 - x0) / (high[0] - low[0]) + (y1 - y0) / (high[1] - low[1])) / 2
            for scale in SCALES:
                size = np.float32(radius * scale)
                centre = np.array([(x0 + x1) / 2, (y0 + y1) / 2], np.float32) - size * (low + high) / 2
                places = centre + shifts[:, None] + size * edge
                ground = _read(grey, places + GROUND * out)
                line = np.minimum.reduce([_read(grey, places + np.float32(depth) * out) for depth in LINE])
                share = float((ground - line > FALL).mean(1).max())
                if share > best[1]:
                    best = (plate, share)
    return best


def _read(grey: NDArray[np.float32], places: Points) -> NDArray[np.float32]:
    """The grey values at places (..., 2) as x, y in pixels, between pixels by their neighbours'."""
    height, width = grey.shape
    x, y = np.clip(places[..., 0] - 0.5, 0, width - 1.001), np.clip(places[..., 1] - 0.5, 0, height - 1.001)
    column, row = x.astype(int), y.astype(int)
    right, down = x - column, y - row
    top = grey[row, column] * (1 - right) + grey[row, column + 1] * right
    bottom = grey[row + 1, column] * (1 - right) + grey[row + 1, column + 1] * right
    return top * (1 - down) + bottom * down
