"""Draws the pack's icon and banner with the toy: `python tools/host.py python -m toy.signs`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hosting.device import use_cpu_without_gpu
from numpy.typing import NDArray
from PIL import Image

use_cpu_without_gpu()

from .sampling import Toy  # noqa: E402, the host reads its command line when it is imported

FOLDER = Path(__file__).parents[1] / "docs"
# A square of at most 400 pixels, and a banner of 21:9, as the registry takes them.
ICON = 384
COLUMNS, ROWS = 7, 3
SHAPES = ("circle", "square", "star", "heart", "triangle", "ring", "cross")
COLOURS = ("red", "yellow", "blue", "green", "orange", "purple", "white")
GROUNDS = ("grass", "sand", "water")


def main() -> None:
    toy = Toy.load()
    captions = [
        f"a {COLOURS[(row + n) % 7]} {SHAPES[n]} on {GROUNDS[row]}" for row in range(ROWS) for n in range(COLUMNS)
    ]
    tiles = _bytes(toy.sample(captions, range(len(captions)), steps=16).cpu().numpy())
    rows = [np.concatenate(list(tiles[row * COLUMNS : (row + 1) * COLUMNS]), 1) for row in range(ROWS)]
    Image.fromarray(np.concatenate(rows)).save(FOLDER / "banner.png", optimize=True)
    Image.fromarray(tiles[COLUMNS - 2]).resize((ICON, ICON), Image.Resampling.LANCZOS).save(
        FOLDER / "icon.png", optimize=True
    )


def _bytes(pictures: NDArray[np.float32]) -> NDArray[np.uint8]:
    return (pictures * 255).round().astype(np.uint8)


if __name__ == "__main__":
    main()
