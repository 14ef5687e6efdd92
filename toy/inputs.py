"""Draws the pictures that the shipped workflows load: `python tools/host.py python -m toy.inputs`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .drawing import draw
from .scenes import EMBLEM, SIZE, Background, Emblem, Scene, Thing, view

FOLDER = Path(__file__).parents[1] / "workflows" / "input"
# They lie in the input folder of whoever has the pack, among that person's own.
PREFIX = "subject_patches_"
PLAQUE = Emblem("shield", "white", "red", tuple(c == "#" for c in ".##.#..##..#.##."))
SHIELD = Emblem("shield", "yellow", "blue", tuple(c == "#" for c in "#..##..#.##..##."))
RING = Emblem("disc", "red", "white", tuple(c == "#" for c in ".##.#..##..#.##."))
MIDDLE = SIZE / 2
# What the views of the shield stand on that a residual token is trained on, and those that an ICO concept is.
GROUNDS = (Background("plain", ("gray",)), Background("grass"), Background("brick"), Background("plain", ("white",)))
PLAIN_GROUNDS = tuple(Background("plain", (colour,)) for colour in ("white", "gray", "cyan", "pink"))


def save(name: str, image: NDArray[np.uint8], opaque: NDArray[np.bool_]) -> None:
    """Writes a picture whose transparent places are the host's mask."""
    rgba = np.dstack([image, np.where(opaque, 255, 0).astype(np.uint8)])
    Image.fromarray(rgba).save(FOLDER / f"{PREFIX}{name}.png", optimize=True)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, emblem in (("emblem", SHIELD), ("second_emblem", RING)):
        thing = Thing(EMBLEM, emblem.plate_colour, "plain", MIDDLE, MIDDLE, 42, 0.0, emblem)
        reference = draw(Scene((thing,), Background("plain", ("gray",))))
        save(name, reference.image, reference.masks[0])
    neighbour = Thing("star", "red", "plain", 34, 92, 24, 0.2)
    scene = draw(Scene((neighbour,), Background("grass"), seed=5))
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    save("scene", scene.image, np.hypot(x - 82, y - 48) >= 34)
    rng = np.random.default_rng(4)
    for number, ground in enumerate(GROUNDS, 1):
        save(f"shield_{number}", draw(view(SHIELD, rng, ground)).image, np.ones((SIZE, SIZE), dtype=bool))
    for number, ground in enumerate(PLAIN_GROUNDS, 1):
        save(f"plain_shield_{number}", draw(view(SHIELD, rng, ground)).image, np.ones((SIZE, SIZE), dtype=bool))
    other = Thing(EMBLEM, PLAQUE.plate_colour, "plain", 74, 66, 36, 0.25, PLAQUE)
    retouched = draw(Scene((other,), Background("grass"), seed=7))
    save("another_emblem", retouched.image, ~retouched.masks[0])


if __name__ == "__main__":
    main()
