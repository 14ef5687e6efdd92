"""Scenes of several emblems that are all known, from which the toy's router learns which place is whose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..encoders.segmented import segmented
from ..patches.parts.masks import resize_mask
from ..training.router import spread
from .drawing import Picture, draw
from .pairs import REFERENCE, Store, reference_of, signal
from .scenes import CELL, EMBLEM, SIZE, Emblem, describe, sample_emblem, sample_scene

MOST = 3
# How many of a scene's things are known emblems, and how often there is one thing more that is none.
COUNTS, FURTHER = (0.15, 0.5, 0.35), 0.3


@dataclass
class GroupBatch:
    """Rows to train on: `latents` (n, 8, 16, 16) of scenes, `tokens` (n, 77) of their captions; and of each of its up
    to MOST subjects whether it is `present` (n, 3), where it is in the scene, `emblems` (n, 3, 16, 16), its
    `references` (n, 3, 8, 12, 12) with their `mask` (n, 3, 12, 12), and what the vision model sees of them, `seen` (n,
    3, 145, 96)."""

    latents: Tensor
    tokens: Tensor
    present: Tensor
    emblems: Tensor
    references: Tensor
    mask: Tensor
    seen: Tensor

    @property
    def inside(self) -> Tensor:
        """Where any of them is in the scenes (n, 1, 16, 16)."""
        return (self.emblems.amax(1, keepdim=True) > 0.3).float()


def scene_of(emblems: list[Emblem], rng: np.random.Generator) -> tuple[Picture, list[int]]:
    """A picture of these emblems, maybe with a thing that is none, and which of its things they are."""
    count = len(emblems) + int(rng.random() < FURTHER)
    scene = sample_scene(rng, count, 0.0)
    while any(emblem.plate_colour in scene.background.colours for emblem in emblems):
        scene = sample_scene(rng, count, 0.0)
    places, things = rng.permutation(count)[: len(emblems)].tolist(), list(scene.things)
    for place, emblem in zip(places, emblems, strict=True):
        look = {"shape": EMBLEM, "colour": emblem.plate_colour, "texture": "plain", "emblem": emblem}
        things[place] = replace(things[place], **look)
    scene = replace(scene, things=tuple(things))
    return draw(replace(scene, caption=describe(scene, rng))), places


class Groups(Store):
    """A store of such scenes, each with a reference of every emblem in it; `vision` is what looks at these.

    With `known` every scene has just so many, and nothing else."""

    def __init__(
        self, autoencoder: Any, vision: nn.Module, rng: np.random.Generator, capacity: int, known: int | None = None
    ) -> None:
        super().__init__(autoencoder, rng, capacity)
        self.vision, self.known = vision, known

    def add(self, count: int) -> None:
        """Draws and encodes so many more scenes."""
        several = [self.known or int(self.rng.choice(MOST, p=COUNTS)) + 1 for _ in range(count)]
        emblems = [[sample_emblem(self.rng) for _ in range(number)] for number in several]
        scenes = [scene_of(each, self.rng) for each in emblems]
        images = torch.from_numpy(np.stack([drawn.image for drawn, _ in scenes])).float() / 255
        shown = [segmented(*reference_of(emblem, self.rng), REFERENCE) for each in emblems for emblem in each]
        pixels, masks = (torch.cat(each) for each in zip(*shown, strict=True))
        inside = torch.from_numpy(np.concatenate([drawn.masks[places] for drawn, places in scenes])).float()
        present = torch.arange(MOST) < torch.tensor(several)[:, None]

        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            seen = self.vision(pixels, intermediate_output=-2)[1].float()
        self._keep(
            {
                "latents": self._encoded(signal(images)),
                "tokens": self.words([drawn.scene.caption for drawn, _ in scenes]),
                "present": present,
                "emblems": spread(resize_mask(inside, (SIZE // CELL, SIZE // CELL)), present),
                "references": spread(self._encoded(pixels), present),
                "mask": spread(resize_mask(masks, (REFERENCE // CELL, REFERENCE // CELL)), present),
                "seen": spread(seen, present),
            },
            count,
        )

    def draw(self, count: int, generator: torch.Generator | None = None) -> GroupBatch:
        """Rows at random."""
        return self.rows(self._some(count, generator))

    def rows(self, numbers: Tensor) -> GroupBatch:
        drawn = {name: kept[numbers] for name, kept in self.kept.items()}
        whole = {name: each.float() if each.is_floating_point() else each for name, each in drawn.items()}
        return GroupBatch(**{**whole, "tokens": drawn["tokens"].long()})
