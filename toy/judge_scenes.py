"""What the toy's judge learns from: labelled scenes, views of emblems in hard pairs, and how generated pictures differ
from drawn ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import IterableDataset, get_worker_info

from .drawing import Picture, draw
from .judge import COLOUR_NAMES, SHAPE_NAMES
from .scenes import BACKGROUNDS, SIZE, TEXTURES, Emblem, Scene, sample_emblem, sample_scene
from .shapes import PLATES

MOST = 4  # things in a scene
NONE = -100  # the class index that a cross entropy leaves out
Batch = dict[str, Tensor]


def sibling(emblem: Emblem, rng: np.random.Generator) -> Emblem:
    """Another emblem of the same plate and colours: a fresh glyph, or the same one with two to four cells changed."""
    if rng.random() < 0.5:
        return replace(emblem, cells=sample_emblem(rng).cells)
    cells = np.array(emblem.cells)
    cells[rng.choice(cells.size, rng.integers(2, 5), replace=False)] ^= True
    return replace(emblem, cells=tuple(bool(c) for c in cells)) if cells.sum() > 3 else sibling(emblem, rng)


def emblem_view(emblem: Emblem, rng: np.random.Generator) -> Picture:
    """A view of an emblem, alone or in company; it is the first thing of its scene."""
    scene = sample_scene(rng)
    while emblem.plate_colour in scene.background.colours:
        scene = sample_scene(rng)
    old = scene.things[0]
    thing = replace(old, shape="emblem", colour=emblem.plate_colour, texture="plain", emblem=emblem)
    return draw(Scene((thing, *scene.things[1:]), scene.background, scene.seed))


def label_scene(picture: Picture) -> Batch:
    """What the detector learns of a picture: boxes (4, 4), classes (4, 3; NONE in unused rows), background (3)."""
    boxes, classes = np.full((MOST, 4), 1e4, dtype=np.float32), np.full((MOST, 3), NONE)
    things, ground = picture.scene.things, picture.scene.background
    boxes[: len(things)] = picture.boxes
    for row, thing in zip(classes, things, strict=False):
        row[:] = SHAPE_NAMES.index(thing.shape), COLOUR_NAMES.index(thing.colour), TEXTURES.index(thing.texture)
    colours = [COLOUR_NAMES.index(c) for c in ground.colours] or [NONE]
    background = np.array([BACKGROUNDS.index(ground.kind), colours[0], colours[-1]])
    return {
        "image": torch.from_numpy(picture.image),
        "boxes": torch.from_numpy(boxes),
        "classes": torch.from_numpy(classes),
        "background": torch.from_numpy(background),
    }


def label_emblem(emblem: Emblem, number: int, picture: Picture) -> Batch:
    """What the identity network learns of a view: its emblem's number in the batch, plate, colours and glyph cells."""
    colours = map(COLOUR_NAMES.index, (emblem.plate_colour, emblem.glyph_colour))
    words = number, tuple(PLATES).index(emblem.plate), *colours
    return {
        "image": torch.from_numpy(picture.image),
        "boxes": torch.from_numpy(picture.boxes[:1].astype(np.float32)),
        "words": torch.tensor(words),
        "cells": torch.tensor(emblem.cells, dtype=torch.float32),
    }


def to_planes(images: Tensor) -> Tensor:
    """Pictures (b, 128, 128, 3) of bytes as planes (b, 3, 128, 128) in 0..1."""
    return images.movedim(-1, 1).float() / 255


def stack(rows: Sequence[Batch]) -> Batch:
    """One batch of rows that have the same names."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class Samples(IterableDataset):
    """Endless batches of `batch` scenes and `batch` emblem views: two of each emblem, emblems in pairs that only
    their glyphs tell apart. Every worker of a run draws its own stream."""

    def __init__(self, batch: int, seed: int, start: int) -> None:
        self.batch, self.seed, self.start = batch, seed, start

    def __iter__(self) -> Iterator[tuple[Batch, Batch]]:
        worker = get_worker_info()
        rng = np.random.default_rng((self.seed, self.start, worker.id if worker else 0))
        while True:
            scenes = [label_scene(draw(sample_scene(rng))) for _ in range(self.batch)]
            emblems: list[Emblem] = []
            for _ in range(self.batch // 4):
                first = sample_emblem(rng)
                emblems += [first, sibling(first, rng)]
            views = [label_emblem(e, n, emblem_view(e, rng)) for n, e in enumerate(emblems) for _ in range(2)]
            yield stack(scenes), stack(views)


def _field(shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """Smooth noise (b, channels, 128, 128) that varies over a grid of the given (b, channels, rows, columns)."""
    return functional.interpolate(torch.randn(shape, device=like.device), (SIZE, SIZE), mode="bicubic")


def degrade(images: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures (b, 3, 128, 128) in 0..1 with their boxes (b, n, 4) in pixels, as generated pictures would show them:
    zoomed, warped, blurred, tinted, blotched and noisy. Every sixth picture or so stays as it is."""
    count, device = len(images), images.device

    def amount(most: float) -> Tensor:
        return most * torch.rand(count, 1, 1, 1, device=device) * strength

    strength = (torch.rand(count, 1, 1, 1, device=device) - 0.15).clamp(min=0).sqrt()
    scale = 1 - amount(0.15)
    shift = (1 - scale) * (torch.rand(count, 2, 1, 1, device=device) * 2 - 1)
    bend = amount(0.025) * _field((count, 2, 5, 5), images) + amount(0.015) * _field((count, 2, 12, 12), images)
    axis = (torch.arange(SIZE, device=device) + 0.5) * (2 / SIZE) - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    source = torch.stack([x, y])[None] * scale + shift + bend
    # A corner lands where its source is; the bend is smooth, so reading it one step early is close enough.
    corners = boxes.reshape(count, -1, 1, 2) * (2 / SIZE) - 1
    origin, ratio = shift.view(count, 1, 1, 2), scale.view(count, 1, 1, 1)
    bent = functional.grid_sample(bend, (corners - origin) / ratio, padding_mode="border", align_corners=False)
    corners = (corners - origin - bent.movedim(1, -1)) / ratio
    boxes = ((corners + 1) * (SIZE / 2)).reshape(boxes.shape)
    images = functional.grid_sample(images, source.movedim(1, -1), padding_mode="border", align_corners=False)
    for size, most in ((64, 1.0), (48, 0.8), (32, 0.4)):
        small = functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
        images = torch.lerp(images, functional.interpolate(small, (SIZE, SIZE), mode="bilinear"), amount(most))
    tint = torch.randn(2, count, 3, 1, 1, device=device)
    images = (images - 0.5) * (1 + amount(0.12) * tint[0]) + 0.5 + amount(0.06) * tint[1]
    images = images + amount(0.07) * _field((count, 3, 16, 16), images) + amount(0.08) * torch.randn_like(images)
    return images.clamp(0, 1), boxes
