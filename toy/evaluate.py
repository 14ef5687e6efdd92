"""Measures how well a toy obeys its prompts: `python tools/host.py python -m toy.evaluate [--toy dit]`.

Prints the tables of docs/TOY.md: for held-out captions of one and of two objects, how often the judge finds every
shape, colour and texture, and of "an emblem on X" the emblem and the ground; and the same for the drawn scenes
themselves, as drawn and through the autoencoder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .drawing import draw
from .judge import Judge, caption_score, load_judge
from .plates import ENOUGH, fit
from .scenes import (
    EMBLEM,
    SMALL,
    TEXTURED_BACKGROUNDS,
    WHOLE,
    Scene,
    World,
    describe,
    sample_emblem,
    sample_scene,
    view,
)

if TYPE_CHECKING:
    from .sampling import Toy

HELD_OUT = 2**41


def held_out_scenes(count: int, things: int, world: World = WHOLE) -> list[Scene]:
    """Scenes of `things` shapes (no emblems: a caption says nothing to check of them) that no training draws."""
    rng = np.random.default_rng((HELD_OUT, things))
    return [sample_scene(rng, things, emblem_share=0.0, world=world) for _ in range(count)]


def held_out_emblems(count: int) -> list[Scene]:
    """Scenes of one emblem that no training draws, each captioned "an emblem on X"."""
    rng = np.random.default_rng((HELD_OUT, 0))
    scenes = [view(sample_emblem(rng), rng) for _ in range(count)]
    return [replace(scene, caption=describe(scene)) for scene in scenes]


def shares(judge: Judge, images: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Of pictures that should show these scenes, the share with all things right, the share of things right, and the
    share of backgrounds right."""
    scores = []
    for start in range(0, len(images), 50):
        readings = judge.findings(images[start : start + 50])
        batch = scenes[start : start + 50]
        scores += [caption_score(r, s.things, s.background) for r, s in zip(readings, batch, strict=True)]
    return {
        "all things": float(np.mean([s.all_things for s in scores])),
        "things": float(np.mean([found for s in scores for found in s.things])),
        "background": float(np.mean([s.background for s in scores])),
    }


def plates_right(judge: Judge, images: Tensor) -> float:
    """The share of pictures in which the outline of what the judge sees first, an emblem if there is one, is one of the
    plates'. No caption says which one. Only for textured grounds; see `plates`."""
    right = []
    for image, reading in zip(images, judge.findings(images), strict=True):
        things = sorted(reading.objects, key=lambda thing: (thing.shape != EMBLEM, -thing.score))
        right.append(bool(things) and fit(image.numpy(), things[0].box)[1] >= ENOUGH)
    return float(np.mean(right))


def made(toy: Toy, scenes: Sequence[Scene], given: argparse.Namespace) -> Tensor:
    """A picture of each scene's caption."""
    pictures = []
    for start in range(0, len(scenes), given.batch):
        captions = [scene.caption for scene in scenes[start : start + given.batch]]
        seeds = list(range(start, start + len(captions)))
        pictures.append(toy.sample(captions, seeds, steps=given.steps, cfg=given.cfg))
        print(f"{start + len(captions)} of {len(scenes)}", file=sys.stderr, flush=True)
    return torch.cat(pictures)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", choices=("first", "dit"), default="first")
    parser.add_argument("--kinds", nargs="+", choices=("one", "two", "emblem"), default=("one", "two", "emblem"))
    parser.add_argument("--made-only", action="store_true", help="leave out the drawn scenes")
    parser.add_argument("--count", type=int, default=500, help="captions of each kind")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--checkpoint", type=Path, default=None, help="another checkpoint than the shipped one")
    given = parser.parse_args()
    from comfy.cli_args import args as host_arguments

    host_arguments.cpu = not torch.cuda.is_available()
    # Denormal numbers slow a CPU down several times, and mean nothing here.
    torch.set_flush_denormal(True)
    from .sampling import CHECKPOINT, DIT_CHECKPOINT, Toy

    shipped, world = (DIT_CHECKPOINT, SMALL) if given.toy == "dit" else (CHECKPOINT, WHOLE)
    toy, judge = Toy.load(given.checkpoint or shipped), load_judge()
    kinds = {
        "one": ("one thing", lambda: held_out_scenes(given.count, 1, world)),
        "two": ("two things", lambda: held_out_scenes(given.count, 2, world)),
        "emblem": ("an emblem", lambda: held_out_emblems(given.count)),
    }
    print("| pictures | all things right | things right | background right |\n|---|---|---|---|")
    plates: dict[str, str] = {}
    for kind in given.kinds:
        name, scenes = kinds[kind][0], kinds[kind][1]()
        rows = {}
        if not given.made_only:
            rows["drawn"] = torch.from_numpy(np.stack([draw(scene).image for scene in scenes])).float() / 255
            # The host's VAE takes all pictures at once where it thinks they fit: a few at a time need less memory.
            parts = rows["drawn"].split(given.batch)
            kept = [toy.vae.decode(toy.vae.encode(some))[..., :3].clamp(0, 1) for some in parts]
            rows["drawn, through the autoencoder"] = torch.cat(kept)
        rows["made from the caption"] = made(toy, scenes, given)
        for row, images in rows.items():
            found = shares(judge, images, scenes)
            print(f"| {name}, {row} | " + " | ".join(f"{found[k]:.1%}" for k in found) + " |", flush=True)
            if kind == "emblem":
                textured = torch.tensor([scene.background.kind in TEXTURED_BACKGROUNDS for scene in scenes])
                plates[row] = f"{plates_right(judge, images[textured]):.1%} of {int(textured.sum())}"
    for row, found in plates.items():
        print(f"\nThe plate's shape is right, on textured grounds, {row}: {found}")


if __name__ == "__main__":
    main()
