"""Measures how well the toy obeys its prompts: `python tools/host.py python -m toy.evaluate`.

Prints the table of docs/TOY.md: for held-out captions of one and of two objects, how often the judge finds every
shape, colour and texture, and the same for the drawn scenes themselves, as drawn and through the autoencoder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .drawing import draw
from .judge import Judge, caption_score, load_judge
from .scenes import Scene, sample_scene

HELD_OUT = 2**41


def held_out_scenes(count: int, things: int) -> list[Scene]:
    """Scenes of `things` shapes (no emblems: a caption says nothing to check of them) that no training draws."""
    rng = np.random.default_rng((HELD_OUT, things))
    return [sample_scene(rng, things, emblem_share=0.0) for _ in range(count)]


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


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    from .sampling import CHECKPOINT, Toy

    toy, judge = Toy.load(given.checkpoint or CHECKPOINT), load_judge()
    print("| pictures | all things right | things right | background right |\n|---|---|---|---|")
    for things in (1, 2):
        scenes = held_out_scenes(given.count, things)
        drawn = torch.from_numpy(np.stack([draw(scene).image for scene in scenes])).float() / 255
        # The host's VAE takes all pictures at once where it thinks they fit: a few at a time need less memory.
        kept = [toy.vae.decode(toy.vae.encode(some))[..., :3].clamp(0, 1) for some in drawn.split(given.batch)]
        rows = {"drawn": drawn, "drawn, through the autoencoder": torch.cat(kept)}
        made = []
        for start in range(0, len(scenes), given.batch):
            captions = [scene.caption for scene in scenes[start : start + given.batch]]
            seeds = list(range(start, start + len(captions)))
            made.append(toy.sample(captions, seeds, steps=given.steps, cfg=given.cfg))
            print(f"{things} things: {start + len(captions)} of {len(scenes)}", file=sys.stderr, flush=True)
        rows["made from the caption"] = torch.cat(made)
        for name, images in rows.items():
            found = shares(judge, images, scenes)
            print(f"| {things} things, {name} | " + " | ".join(f"{found[k]:.1%}" for k in found) + " |", flush=True)


if __name__ == "__main__":
    main()
