"""Multi-Source Attention Swap on the toy: a picture that is layout and reference at once is given back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from subject_patches.nodes.trajectory import InvertToTrajectoryNode
from subject_patches.tests.shared.models import swapped
from subject_patches.toy.sampling import Toy
from torch import Tensor


@dataclass(frozen=True)
class Picture:
    """A picture of the toy with the prompt it was made with, to be given back."""

    toy: Toy
    latent: Tensor
    sigmas: Tensor
    own: Any

    def path(self, conditioning: Any, rounds: int) -> tuple[Any, Tensor]:
        given = ({"samples": self.latent}, self.sigmas, None, conditioning, rounds)
        inversion, last, *_ = InvertToTrajectoryNode.execute(self.toy.model, *given).args
        return inversion, last["samples"]

    def swap(self, path: Any) -> Any:
        """The toy with one path as layout and reference, and all of the picture the layout's."""
        return swapped(self.toy.model, path, path, layout_conditioning=self.own, blend_mask=torch.zeros(1, 128, 128))

    def psnr(self, model: Any, start: Tensor, prompt_: Any, cfg: float) -> float:
        """In dB, of a picture sampled from noisy latents against this one through the autoencoder."""
        result = comfy.sample.sample_custom(
            model, torch.zeros_like(start), cfg, comfy.samplers.sampler_object("euler"), self.sigmas, prompt_,
            self.toy.encode([""]), start, disable_pbar=True, seed=0,
        )  # fmt: skip
        shown, right = (self.toy.vae.decode(each)[..., :3].clamp(0, 1) for each in (result, self.latent))
        return -10 * math.log10(float((shown - right).square().mean()))


@pytest.fixture(scope="module")
def pictures() -> Iterator[list[Picture]]:
    toy = Toy.load()
    sigmas = comfy.samplers.calculate_sigmas(toy.model.get_model_object("model_sampling"), "normal", 8)
    captions = ["a red star on grass", "an emblem on water"]
    with torch.inference_mode():
        latents = toy.vae.encode(toy.sample(captions, [3, 4], steps=8))
        rows = zip(latents.split(1), captions, strict=True)
        yield [Picture(toy, latent, sigmas, toy.encode([caption])) for latent, caption in rows]


def test_a_picture_on_its_own_path_is_given_back(pictures: list[Picture]) -> None:
    """Layout and reference are one picture and the mask is empty. Sampled as it was inverted, with fixed-point rounds,
    target and layout go one way: what is swapped in is what was there. Another picture's path leads away."""
    one, other = pictures
    path, last = one.path(one.own, 5)
    assert one.psnr(one.swap(path), last, one.own, 1.0) > 45
    assert one.psnr(one.swap(other.path(other.own, 0)[0]), last, one.own, 1.0) < 30


def test_the_papers_way_gives_a_picture_back(pictures: list[Picture]) -> None:
    """The same where target and layout go two ways: inverted with the empty prompt and sampled with another prompt, and
    guidance. The swap leads back to the picture."""
    picture = pictures[0]
    path, last = picture.path(picture.toy.encode([""]), 0)
    neutral = picture.toy.encode(["a blue circle"])
    with_swap, without = (picture.psnr(m, last, neutral, 4.0) for m in (picture.swap(path), picture.toy.model))
    assert with_swap > without + 2
