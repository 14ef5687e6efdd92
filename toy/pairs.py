"""Pairs of pictures of one emblem, from which the toy's trainings of what shows subjects learn.

One is a scene with the emblem in it, which is to be denoised; the other becomes a reference as the nodes Subject
Reference and Encode Subjects make it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..encoders.segmented import segmented
from ..patches.mechanisms.subject import fit, mask_bounds
from ..patches.parts.masks import resize_mask
from .data import Words
from .drawing import Picture, draw
from .family import VISION
from .scenes import (
    CELL,
    COLOURS,
    EMBLEM,
    LARGE,
    SIZE,
    Background,
    Emblem,
    describe,
    sample_emblem,
    sample_scene,
    view,
)

REFERENCE = VISION["image_size"]
VIEWS = 2
# Kept with less precision than they are drawn with, because there are many.
KEPT = {"tokens": torch.int32, "pixels": torch.uint8, "grounds": torch.uint8}


@dataclass
class Batch:
    """Rows to train on: `latents` (n, 8, 16, 16) of scenes and where the emblem is in them `emblem` (n, 16, 16),
    `tokens` (n, 77) of their captions, `references` (n, 8, 12, 12) and `mask` (n, 12, 12); and as the vision model
    takes them (n, 3, 96, 96) the references, cut out (`pixels`), and of pairs that keep them the scenes without the
    emblem (`grounds`)."""

    latents: Tensor
    emblem: Tensor
    tokens: Tensor
    references: Tensor
    mask: Tensor
    pixels: Tensor
    grounds: Tensor | None = None


def scene_with(emblem: Emblem, rng: np.random.Generator) -> tuple[Picture, int]:
    """A picture of the emblem, alone or beside one or two other things, and which of its things it is."""
    count = int(rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1]))
    # Half of those alone are so large that latents can hold their glyph.
    smallest = LARGE if count == 1 and rng.random() < 0.5 else 0.0
    scene = sample_scene(rng, count, 0.0, smallest=smallest)
    while emblem.plate_colour in scene.background.colours:
        scene = sample_scene(rng, count, 0.0, smallest=smallest)
    place = int(rng.integers(count))
    shown = replace(scene.things[place], shape=EMBLEM, colour=emblem.plate_colour, texture="plain", emblem=emblem)
    scene = replace(scene, things=(*scene.things[:place], shown, *scene.things[place + 1 :]))
    return draw(replace(scene, caption=describe(scene, rng))), place


def reference_of(emblem: Emblem, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A picture of the emblem (1, height, width, 3) of 0 to 1, cropped to it with its ground and with a longer side of
    96 pixels, and its mask (1, height, width)."""
    colours = [name for name in COLOURS if name != emblem.plate_colour]
    ground = None if rng.random() < 0.4 else Background("plain", (str(rng.choice(colours)),))
    drawn = draw(view(emblem, rng, ground))
    image, mask = torch.from_numpy(drawn.image).float()[None] / 255, torch.from_numpy(drawn.masks[:1]).float()
    x0, y0, x1, y1 = mask_bounds(mask[0], float(rng.uniform(0.08, 0.22)))
    return fit(image[:, y0:y1, x0:x1], mask[:, y0:y1, x0:x1], REFERENCE, CELL)


def squared(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A picture and its mask filled up to a square with its edge, outside the mask, so that pictures of all forms make
    a batch."""
    more = (0, REFERENCE - image.shape[2], 0, REFERENCE - image.shape[1])
    image = functional.pad(image.movedim(-1, 1), more, mode="replicate").movedim(1, -1)
    return image, functional.pad(mask, more)


class Store:
    """So many encoded rows, of which what is drawn next takes the place of the oldest."""

    def __init__(self, autoencoder: Any, rng: np.random.Generator, capacity: int) -> None:
        self.autoencoder, self.rng, self.capacity, self.written = autoencoder, rng, capacity, 0
        self.words = Words()
        self.kept: dict[str, Tensor] = {}

    def _encoded(self, pixels: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return self.autoencoder.encode(pixels).float()

    def _keep(self, made: dict[str, Tensor], count: int) -> None:
        """Keeps so many more rows (count, ...), in less precision where KEPT says so or the tensor has fractions."""
        rows = (self.written + torch.arange(count)) % self.capacity
        for name, tensor in made.items():
            if name not in self.kept:
                kind = KEPT.get(name, torch.float16 if tensor.is_floating_point() else tensor.dtype)
                self.kept[name] = torch.empty((self.capacity, *tensor.shape[1:]), dtype=kind)
            self.kept[name][rows] = tensor.to(self.kept[name].dtype)
        self.written += count

    def _some(self, count: int, generator: torch.Generator | None) -> Tensor:
        """The numbers (count) of rows at random."""
        return torch.randint(min(self.written, self.capacity), (count,), generator=generator)


class Pairs(Store):
    """A store of encoded pairs: every emblem has two scenes and two references, and a batch takes one of each.

    The references that the VAE reads are cut out, as AnyStory's; with `grounds` they have theirs, as AnyLogo's, and
    what is around the emblem in the scenes is kept, too."""

    def __init__(self, autoencoder: Any, rng: np.random.Generator, capacity: int, grounds: bool = False) -> None:
        super().__init__(autoencoder, rng, capacity)
        self.grounds = grounds

    def _references(self, emblems: list[Emblem]) -> tuple[Tensor, Tensor, Tensor]:
        """Of each emblem VIEWS: what the VAE reads (n, 3, 96, 96) of -1 to 1, the mask in it (n, 96, 96), and what the
        vision model does."""
        shown = [reference_of(emblem, self.rng) for emblem in emblems for _ in range(VIEWS)]
        if self.grounds:
            images, masks = (torch.cat(each) for each in zip(*(squared(*each) for each in shown), strict=True))
            return signal(images), masks, segmented(images, masks, REFERENCE)[0]
        cut, masks = (torch.cat(each) for each in zip(*(segmented(*each, REFERENCE) for each in shown), strict=True))
        return cut, masks, cut

    def add(self, count: int) -> None:
        """Draws and encodes so many more emblems."""
        emblems = [sample_emblem(self.rng) for _ in range(count)]
        scenes = [scene_with(emblem, self.rng) for emblem in emblems for _ in range(VIEWS)]
        references, masks, pixels = self._references(emblems)
        images = torch.from_numpy(np.stack([drawn.image for drawn, _ in scenes])).float() / 255
        inside = torch.from_numpy(np.stack([drawn.masks[place] for drawn, place in scenes])).float()
        made = {
            "latents": self._encoded(signal(images)),
            "emblem": resize_mask(inside, (SIZE // CELL, SIZE // CELL)),
            "tokens": self.words([drawn.scene.caption for drawn, _ in scenes]),
            "references": self._encoded(references),
            "mask": resize_mask(masks, (REFERENCE // CELL, REFERENCE // CELL)),
            "pixels": as_bytes(pixels),
        }
        if self.grounds:
            made["grounds"] = as_bytes(segmented(images, 1 - inside, REFERENCE)[0])
        self._keep({name: tensor.unflatten(0, (count, VIEWS)) for name, tensor in made.items()}, count)

    def draw(self, count: int, generator: torch.Generator | None = None) -> Batch:
        """Rows of emblems, scenes and references at random."""
        number = self._some(count, generator)
        scene, reference = (torch.randint(VIEWS, (count,), generator=generator) for _ in range(2))
        views = {"references": reference, "mask": reference, "pixels": reference}
        drawn = {name: kept[number, views.get(name, scene)] for name, kept in self.kept.items()}
        whole = {name: drawn[name].float() for name in ("latents", "emblem", "references", "mask")}
        seen = {name: drawn[name].float() / 127.5 - 1 for name in ("pixels", "grounds") if name in drawn}
        return Batch(tokens=drawn["tokens"].long(), **whole, **seen)


def signal(images: Tensor) -> Tensor:
    """Pictures (n, height, width, 3) of 0 to 1 as the VAE takes them, (n, 3, height, width) of -1 to 1."""
    return images.movedim(-1, 1) * 2 - 1


def as_bytes(pixels: Tensor) -> Tensor:
    """Values of -1 to 1 as 0 to 255."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255)
