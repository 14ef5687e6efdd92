"""What a toy names of each latent cell while it trains, from the features of a middle layer: what fills the cell, and
where in it a thing, and the glyph of an emblem, are."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .drawing import Picture
from .scenes import CELL, COLOURS, EMBLEM, SIZE, TEXTURES
from .shapes import PLATES, SHAPES

LABELS: dict[str, tuple[str, ...]] = {
    "shape": (*SHAPES, EMBLEM),
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "plate": tuple(PLATES),
}
UNLABELLED = 255
CELLS = SIZE // CELL
# Outlines are told at every second pixel: so many places along a cell's side, kept as bits.
PLACES, STEP = 4, CELL // 4
OUTLINES = ("thing", "emblem", "glyph")
ROWS = len(LABELS) + len(OUTLINES) * PLACES**2 // 8
NAMED = sum(map(len, LABELS.values()))
# Scored of each cell: every label, and at each of its places whether a thing is there, and whether a glyph is.
SCORES = NAMED + 2 * PLACES**2
OUTLINE_WEIGHT = 2.0


def labels_of(picture: Picture) -> NDArray[np.uint8]:
    """What each latent cell of a picture shows: (ROWS, 16, 16).

    First its row of each of LABELS, or UNLABELLED where no thing fills half of the cell or what does has no such label:
    no caption says an emblem's colour or texture, and only an emblem has a plate. Then the bits of OUTLINES, see
    `packed`."""
    labels = np.full((len(LABELS), CELLS, CELLS), UNLABELLED, dtype=np.uint8)
    for thing, mask in zip(picture.scene.things, picture.masks, strict=True):
        filled = mask.reshape(CELLS, CELL, CELLS, CELL).mean((1, 3)) > 0.5
        if thing.emblem is None:
            named = {"shape": thing.shape, "colour": thing.colour, "texture": thing.texture}
        else:
            named = {"shape": EMBLEM, "plate": thing.emblem.plate}
        for row, (name, values) in enumerate(LABELS.items()):
            if name in named:
                labels[row, filled] = values.index(named[name])
    return np.concatenate([labels, packed(outlines(picture))])


def outlines(picture: Picture) -> NDArray[np.bool_]:
    """Where a thing is, where an emblem is, and where the glyph of one is: (3, 64, 64), at every second pixel."""
    found = np.zeros((len(OUTLINES), SIZE // STEP, SIZE // STEP), dtype=bool)
    image = picture.image[::STEP, ::STEP].astype(np.float32)
    for thing, mask in zip(picture.scene.things, picture.masks[:, ::STEP, ::STEP], strict=True):
        found[0] |= mask
        if thing.emblem is not None:
            tones = (thing.emblem.glyph_colour, thing.emblem.plate_colour)
            glyph, plate = (np.square(image - np.float32(COLOURS[tone])).sum(-1) for tone in tones)
            found[1] |= mask
            found[2] |= mask & (glyph < plate)
    return found


def packed(found: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Maps (maps, 64, 64) as bits of their cells, two bytes a cell: (2 x maps, 16, 16)."""
    cells = found.reshape(-1, CELLS, PLACES, CELLS, PLACES).transpose(0, 2, 4, 1, 3)
    return np.packbits(cells.reshape(-1, 8, CELLS, CELLS), axis=1)[:, 0]


def unpacked(labels: Tensor) -> Tensor:
    """The places' bits of integer labels (n, ROWS, 16, 16): floats (n, 3, 16 places, 16, 16), maps as in OUTLINES."""
    shifts = torch.arange(7, -1, -1, device=labels.device).view(8, 1, 1)
    bits = labels[:, len(LABELS) :].long()[:, :, None] >> shifts & 1
    return bits.unflatten(1, (len(OUTLINES), -1)).flatten(2, 3).float()


def label_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Of scores (n, SCORES, 16, 16) the cross-entropy where a thing is, summed over LABELS, and OUTLINE_WEIGHT times
    that of the outlines: of things in and right beside the cells that show some of one, of glyphs inside emblems."""
    *parts, things, glyphs = scores.split([*map(len, LABELS.values()), PLACES**2, PLACES**2], 1)
    # A batch of emblems alone has no colours: the mean over no cells would be no number.
    named = sum(
        functional.cross_entropy(part, labels[:, row], ignore_index=UNLABELLED, reduction="sum")
        / (labels[:, row] != UNLABELLED).sum().clamp(min=1)
        for row, part in enumerate(parts)
    )
    thing, emblem, glyph = unpacked(labels).unbind(1)
    near = functional.max_pool2d(thing.amax(1, keepdim=True), 3, 1, 1).expand_as(thing)
    return named + OUTLINE_WEIGHT * (_outline_loss(things, thing, near) + _outline_loss(glyphs, glyph, emblem))


def _outline_loss(scores: Tensor, wanted: Tensor, counted: Tensor) -> Tensor:
    """The binary cross-entropy, averaged where `counted` is 1."""
    losses = functional.binary_cross_entropy_with_logits(scores, wanted, reduction="none")
    return (losses * counted).sum() / counted.sum().clamp(min=1)
