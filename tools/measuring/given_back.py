"""Inversion: how near a picture is given back by its own trajectory, with the multi-source swap and without."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .given import Given, heading, mean, row

if TYPE_CHECKING:
    from torch import Tensor

CFG = 4.0
# How a picture is given back: whether it is inverted with its own prompt and with how many fixed-point rounds, whether
# it is sampled again with its own prompt or with the neutral one, and the guidance.
WAYS = {
    "its own prompt, no guidance, 5 fixed-point rounds": (True, 5, True, 1.0),
    "its own prompt, no guidance": (True, 0, True, 1.0),
    "inverted with the empty prompt, sampled with its own and guidance": (False, 0, True, CFG),
    "the paper: inverted with the empty prompt, sampled with the neutral one and guidance": (False, 0, False, CFG),
}
# The PSNR in dB of a picture with the swap of itself, and without.
Back = tuple[float, float]


def study(given: Given) -> None:
    """Prints the table, over `given.count` drawn scenes of one thing, which have no neutral prompt."""
    found: dict[str, list[Back]] = {name: [] for name, (_, _, own, _) in WAYS.items() if own}
    for number in range(given.count):
        for name, back in found.items():
            back += _scene(given, number, *WAYS[name])
        print(f"scene {number + 1} of {given.count}", file=sys.stderr, flush=True)
    print(f"{given.count} drawn scenes, each sampled from where its own trajectory ends, PSNR in dB:\n")
    table(found)


def table(found: Mapping[str, Sequence[Back]]) -> None:
    """Prints a row for each way."""
    print(heading("with the swap", "without", "with it, the worst"))
    for name, pairs in found.items():
        swapped, plain = zip(*pairs, strict=True)
        print(row(name, *(f"{each:.1f}" for each in (mean(swapped), mean(plain), min(swapped)))))


def given_back(
    given: Given, model: Any, latents: Tensor, inverted_with: Any, rounds: int, own: Any, prompt: Any, cfg: float
) -> list[Back]:
    """What comes back of each picture's latents, inverted with one prompt and sampled again with another; `own` is what
    the swap is told."""
    import torch
    from subject_patches.nodes.retouch import MultiSourceSwapNode
    from subject_patches.nodes.trajectory import InvertToTrajectoryNode

    right, negative = given.decoded(latents), given.toy.encode([""])
    path, _, _, start = InvertToTrajectoryNode.execute(
        model, {"samples": latents}, given.sigmas(), None, inverted_with, rounds
    ).args
    noise, nowhere = start.generate_noise({"samples": latents}), torch.zeros(1, 128, 128)
    swapped = MultiSourceSwapNode.execute(model, path, path, own, blend_mask=nowhere).args[0]
    found = []
    for each in (swapped, model):
        wrong = given.sampled(given.guided(each, prompt, negative, cfg), noise, torch.zeros_like(noise)) - right
        found.append([-10 * math.log10(error) for error in wrong.square().flatten(1).mean(1).tolist()])
    return list(zip(*found, strict=True))


def _scene(given: Given, number: int, known: bool, rounds: int, own: bool, cfg: float) -> list[Back]:
    """Scene `number`, by a way that ends with its own prompt."""
    import numpy as np
    import torch
    from subject_patches.toy.drawing import draw
    from subject_patches.toy.scenes import sample_scene

    toy = given.toy
    scene = sample_scene(np.random.default_rng((2**46, number)), 1, 0.0, world=given.world)
    latents = toy.vae.encode(torch.from_numpy(draw(scene).image).float()[None] / 255)
    prompt = toy.encode([scene.caption])
    return given_back(given, toy.model, latents, prompt if known else toy.encode([""]), rounds, prompt, prompt, cfg)
