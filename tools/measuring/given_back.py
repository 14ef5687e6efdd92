"""Inversion: how near a picture is given back by its own trajectory, with the multi-source swap and without."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from .given import Given

if TYPE_CHECKING:
    from torch import Tensor

CFG = 4.0
# Whether the picture is inverted with its own prompt and with how many fixed-point rounds, and the guidance that it is
# sampled with again, always by its own prompt.
WAYS = {
    "its own prompt, no guidance, 5 fixed-point rounds": (True, 5, 1.0),
    "its own prompt, no guidance": (True, 0, 1.0),
    "inverted with the empty prompt, sampled with its own and guidance": (False, 0, CFG),
}


def study(given: Given) -> None:
    """Prints the table, over `given.count` drawn scenes of one thing."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for number in range(given.count):
        for name, way in WAYS.items():
            found[name].append(given_back(given, number, *way))
        print(f"scene {number + 1} of {given.count}", file=sys.stderr, flush=True)
    print(f"{given.count} drawn scenes, each sampled from where its own trajectory ends, PSNR in dB:\n")
    print("| | with the swap | without | with it, the worst |\n|---|---|---|---|")
    for name, pairs in found.items():
        swapped, plain = ([pair[row] for pair in pairs] for row in range(2))
        means = (sum(each) / len(each) for each in (swapped, plain))
        print(f"| {name} | {' | '.join(f'{mean:.1f}' for mean in means)} | {min(swapped):.1f} |")


def given_back(given: Given, number: int, own: bool, rounds: int, cfg: float) -> tuple[float, float]:
    """PSNR in dB of scene `number`, inverted and sampled again as `WAYS` says, with the swap of itself and without."""
    import numpy as np
    import torch
    from subject_patches.nodes.retouch import MultiSourceSwapNode
    from subject_patches.nodes.trajectory import InvertToTrajectoryNode
    from subject_patches.toy.drawing import draw
    from subject_patches.toy.scenes import sample_scene

    toy = given.toy
    scene = sample_scene(np.random.default_rng((2**46, number)), 1, 0.0, world=given.world)
    latents = toy.vae.encode(torch.from_numpy(draw(scene).image).float()[None] / 255)
    right = _decoded(given, latents)
    prompt, empty = toy.encode([scene.caption]), toy.encode([""])
    inverted_with = prompt if own else empty
    path, _, _, start = InvertToTrajectoryNode.execute(
        toy.model, {"samples": latents}, given.sigmas(), None, inverted_with, rounds
    ).args
    noise = start.generate_noise({"samples": latents})
    swapped = MultiSourceSwapNode.execute(toy.model, path, path, prompt, blend_mask=torch.zeros(1, 128, 128)).args[0]
    errors = [
        (_decoded(given, _sampled(given, model, noise, prompt, empty, cfg)) - right).square().mean()
        for model in (swapped, toy.model)
    ]
    first, second = (-10 * math.log10(float(error)) for error in errors)
    return first, second


def _decoded(given: Given, latents: Tensor) -> Tensor:
    return given.toy.vae.decode(latents)[..., :3].clamp(0, 1)


def _sampled(given: Given, model: Any, noise: Tensor, positive: Any, negative: Any, cfg: float) -> Tensor:
    """What sampling makes of a trajectory's start."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    sampler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, noise * 0, sampler, given.sigmas(), disable_pbar=True, seed=0)
