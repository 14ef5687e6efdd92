"""Companion streams: latents that run beside the generation and lend their features.

A stream says what its latents are at a noise level; the engine runs the model on them and keeps what an edit
asked for. Three kinds cover the five papers: a noised reference (a formula) and a trajectory (kept latents), which are
here, and a branch that denoises by itself, in `denoising.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..parts.cache import FeatureCache, Features
from ..parts.masks import tokens_inside
from ..parts.sites import Site

# (sigma, noise, latents) -> noised latents: the model's own forward process.
NoiseScaling = Callable[[float, Tensor, Tensor], Tensor]
# In the place of a stream's conditioning: the generation's own negative one.
UNCONDITIONAL = "unconditional"


@dataclass(frozen=True)
class Pass:
    """How the model runs on a stream.

    `level` is a share of the model's schedule (1 is its last noise level, nearly clean) at which the stream is looked
    at for every step, instead of at the generation's own (None). With `every` above 1 it is looked at anew at each so
    many steps only. Either way one pass serves several steps. `without_cross_attention` leaves that out, so that no
    prompt acts (AnyStory's ReferenceNet runs so, at level 1).

    Raises ValueError for a level beyond 0 to 1, and for an `every` below 1."""

    level: float | None = None
    every: int = 1
    without_cross_attention: bool = False

    def __post_init__(self) -> None:
        if self.level is not None and not 0 <= self.level <= 1:
            raise ValueError(f"The level of a reference is {self.level}; give a share of the schedule, from 0 to 1.")
        if self.every < 1:
            raise ValueError(f"A reference cannot be looked at anew every {self.every} steps; give 1 or more.")

    @property
    def serves_several(self) -> bool:
        """Whether one pass serves more than one step."""
        return self.level is not None or self.every > 1


class Stream(Protocol):
    """Latents beside the generation. `conditioning` None means the generation's own positive conditioning,
    UNCONDITIONAL its negative one; in a run without one such a stream does not run. `pixels` is the (height, width) of
    its picture where that is not its latents' own, for models that are told a picture's size."""

    conditioning: Any
    how: Pass
    cache: FeatureCache | None
    pixels: tuple[int, int] | None

    @property
    def shape(self) -> torch.Size:
        """The shape of its latents (rows, channels, height, width)."""

    def known(self) -> Tensor | None:
        """The clean latents where the stream has them: what an inpainting U-Net is shown besides the noisy ones."""

    def identity(self) -> tuple[Any, ...] | None:
        """What, besides model, conditioning, noise level and site, decides the features; None is never cached."""

    def latents(self, sigma: float, noise_scaling: NoiseScaling) -> Tensor:
        """The latents (rows, channels, height, width) at `sigma`, in the model's latent space."""

    def denoised(self, sigma: float, prediction: Tensor) -> None:
        """Told the model's prediction of the clean latents after each pass."""

    def keep(self, site: Site, grid: tuple[int, int], features: Features) -> Features:
        """What of a site's features is worth keeping; `grid` is the (height, width) of the stream's tokens."""


@dataclass
class NoisedReference:
    """A clean reference, noised to the current level with one fixed noise (AnyLogo; AnyStory).

    `clean` is (rows, channels, height, width) in the model's latent space, `mask` (rows, height, width) says which
    places are the subject's, None all of them. Row r's noise depends on `seed` and r only."""

    clean: Tensor
    seed: int
    conditioning: Any = None
    mask: Tensor | None = None
    cache: FeatureCache | None = None
    name: tuple[Any, ...] | None = None
    how: Pass = Pass()
    pixels: tuple[int, int] | None = None

    @property
    def shape(self) -> torch.Size:
        return self.clean.shape

    def known(self) -> Tensor | None:
        return self.clean

    def identity(self) -> tuple[Any, ...] | None:
        return None if self.name is None else (*self.name, self.seed, self.how)

    def latents(self, sigma: float, noise_scaling: NoiseScaling) -> Tensor:
        seeds = (self.seed + row for row in range(len(self.clean)))
        rows = [torch.randn(self.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return noise_scaling(sigma, torch.stack(rows).to(self.clean), self.clean)

    def denoised(self, sigma: float, prediction: Tensor) -> None:
        """A formula needs no prediction."""

    def keep(self, site: Site, grid: tuple[int, int], features: Features) -> Features:
        """The features of all rows as one row of tokens (1, n, channels), those outside the mask left out."""
        joined = {part: tensor.flatten(0, 1)[None] for part, tensor in features.items()}
        if self.mask is None:
            return joined
        inside = tokens_inside(self.mask, grid).flatten().nonzero().squeeze(1)
        return {part: tensor[:, inside.to(tensor.device)] for part, tensor in joined.items()}


@dataclass
class Trajectory:
    """Kept latents of a finished path (Layout-and-Retouch): sigmas (n) falling, states (n, rows, channels, h, w).

    At a kept sigma the kept state is given exactly; between two, a straight line in sigma, which is the path of the
    Euler step that made them. Outside the kept range it raises ValueError. What is the picture's own keeps its places:
    its features are (rows, height, width, channels). A cross-attention's keys and values are the prompt's."""

    sigmas: Tensor
    states: Tensor
    conditioning: Any = None
    cache: FeatureCache | None = None
    name: tuple[Any, ...] | None = None
    how: Pass = Pass()
    pixels: ClassVar[None] = None

    @property
    def shape(self) -> torch.Size:
        return self.states.shape[1:]

    def known(self) -> Tensor | None:
        return self.states[-1]

    def identity(self) -> tuple[Any, ...] | None:
        return self.name

    def latents(self, sigma: float, noise_scaling: NoiseScaling) -> Tensor:
        kept = self.sigmas.tolist()
        at = next((i for i, level in enumerate(kept) if math.isclose(level, sigma, rel_tol=1e-5)), None)
        if at is not None:
            return self.states[at]
        check_level("The trajectory", self.sigmas, sigma)
        later = next(i for i, level in enumerate(kept) if level < sigma)
        share = (kept[later - 1] - sigma) / (kept[later - 1] - kept[later])
        return torch.lerp(self.states[later - 1], self.states[later], share)

    def denoised(self, sigma: float, prediction: Tensor) -> None:
        """A kept path needs no prediction."""

    def keep(self, site: Site, grid: tuple[int, int], features: Features) -> Features:
        placed = {"query", "output"} if site.kind == "cross" else {"query", "key", "value", "output"}
        # Where another pack changed the number of tokens, they have no places.
        return {
            part: tensor.unflatten(1, grid) if part in placed and tensor.shape[1] == math.prod(grid) else tensor
            for part, tensor in features.items()
        }


def check_level(what: str, sigmas: Tensor, sigma: float) -> None:
    """Raises ValueError, calling the trajectory `what`, when a noise level lies outside of its falling `sigmas`."""
    first, last = float(sigmas[0]), float(sigmas[-1])
    inside = last <= sigma <= first or any(math.isclose(sigma, end, rel_tol=1e-5) for end in (first, last))
    if not inside:
        raise ValueError(
            f"{what} runs from sigma {first:.4g} to {last:.4g} but is needed at {sigma:.4g}; invert the picture with "
            "sigmas that begin as high as the sampler's and end as low."
        )
