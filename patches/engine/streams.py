"""Companion streams: latents that run beside the generation and lend their features.

A stream says what its latents are at a noise level; the engine runs the model on them and keeps what an edit
asked for. Three kinds cover the five papers: a noised reference (a formula), a trajectory (kept latents), and a
branch that denoises by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..parts.cache import FeatureCache, Features
from ..parts.masks import tokens_inside
from ..parts.sites import Site

# (sigma, noise, latents) -> noised latents: the model's own forward process.
NoiseScaling = Callable[[float, Tensor, Tensor], Tensor]
# (the conditioned prediction, the unconditioned one, the latents they are of) -> the guided prediction.
Guide = Callable[[Tensor, Tensor, Tensor], Tensor]
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


@dataclass(frozen=True)
class Kept:
    """What a noise mask keeps of a picture while the rest is generated: its `clean` latents; `mask` gives the mask at a
    noise level (1 where it is generated, broadcastable to the latents), `noised` the picture there."""

    clean: Tensor
    mask: Callable[[float], Tensor]
    noised: Callable[[float], Tensor]

    def shown(self, sigma: float, state: Tensor) -> Tensor:
        """What the model is shown in the place of `state`, as the host shows it the generation's."""
        mask = self.mask(sigma).to(state)
        return state * mask + self.noised(sigma).to(state) * (1 - mask)

    def predicted(self, sigma: float, prediction: Tensor) -> Tensor:
        """The prediction of the clean latents with what is known of them."""
        mask = self.mask(sigma).to(prediction)
        return prediction * mask + self.clean.to(prediction) * (1 - mask)


@dataclass
class _Point:
    """Where a branch was at a noise level: its `state`, what the model was `shown` of it, what it steps on with (the
    model's prediction, then the guided one), and the latents and prediction of which a sampler by CFG++ takes the noise
    to go on with."""

    sigma: float
    state: Tensor
    shown: Tensor
    prediction: Tensor | None = None
    guided: Tensor | None = None
    unconditional: tuple[Tensor, Tensor] | None = None


@dataclass(eq=False)
class Denoising:
    """A branch that denoises by itself (DCI's auxiliary branch) from `noise` (rows, channels, height, width); `begin`
    gives its latents at the first sigma it is asked for.

    Between two noise levels at which the sampler calls the model it takes one deterministic Euler step. A sampler
    that comes back to an earlier level (a second evaluation in a step) gets the state it had there. One run uses
    one such object: an edit makes it when a run starts.

    Where the generation is guided, the engine gives the branch its guidance: with the generation's unconditional
    prediction, or with `own_guidance` one for the branch's own latents, which costs another pass. Under a noise mask
    the branch is blended with the `kept` region as the generation is; `picture` is what an inpainting U-Net is shown
    of it: the clean latents and the mask, where there is one. `node` is the name of the node that it is of."""

    node: ClassVar[str] = ""

    noise: Tensor
    begin: Callable[[float], Tensor]
    conditioning: Any = None
    cache: FeatureCache | None = None
    how: Pass = Pass()
    own_guidance: bool = False
    kept: Kept | None = None
    picture: tuple[Tensor, Tensor | None] | None = None
    _path: list[_Point] = field(default_factory=list)
    pixels: ClassVar[None] = None

    @property
    def shape(self) -> torch.Size:
        return self.noise.shape

    def known(self) -> Tensor | None:
        return None

    def identity(self) -> tuple[Any, ...] | None:
        return None

    def latents(self, sigma: float, noise_scaling: NoiseScaling) -> Tensor:
        while self._path and self._path[-1].sigma < sigma:
            self._path.pop()
        if not self._path:
            self._arrive(sigma, self.begin(sigma))
        elif self._path[-1].sigma != sigma:
            self._arrive(sigma, self._step(sigma, noise_scaling))
        return self._path[-1].shown

    def _arrive(self, sigma: float, state: Tensor) -> None:
        self._path.append(_Point(sigma, state, state if self.kept is None else self.kept.shown(sigma, state)))

    def _step(self, sigma: float, noise_scaling: NoiseScaling) -> Tensor:
        last = self._path[-1]
        clean = last.prediction if last.guided is None else last.guided
        if clean is None:
            raise ValueError(f"The branch has no prediction at sigma {last.sigma:.4g} to step on to {sigma:.4g}.")
        clean = clean if self.kept is None else self.kept.predicted(last.sigma, clean)
        if last.unconditional is not None:
            return step_by_the_unconditional(clean, *last.unconditional, last.sigma, sigma, noise_scaling)
        state = last.state.to(clean)
        return state + (state - clean) / last.sigma * (sigma - last.sigma)

    def denoised(self, sigma: float, prediction: Tensor) -> None:
        last = self._path[-1]
        if last.sigma == sigma:
            last.prediction, last.guided, last.unconditional = prediction, None, None

    def is_guided(self, sigma: float) -> bool:
        """Whether the branch has its guidance at a noise level."""
        return self._path[-1].sigma == sigma and self._path[-1].guided is not None

    def guided(
        self,
        sigma: float,
        scale: float,
        latents: Tensor,
        unconditional: Tensor,
        plus: bool = False,
        guide: Guide | None = None,
    ) -> None:
        """Told the guidance at `sigma`: its scale, and the unconditional prediction of some latents. With `plus` the
        sampler goes on with the noise of that prediction (CFG++), and so does the branch. `guide` is the generation's
        own rule where it has another than the sum.

        Guidance adds in noises, e_u + scale * (e - e_u), so the latents need not be the branch's: e is their distance
        from their prediction, in sigmas (DCI's code, which shares e_u; in no equation of the paper)."""
        point = self._path[-1]
        if point.sigma == sigma and point.prediction is not None:
            shown = point.shown.to(point.prediction)
            without = latents - unconditional
            if guide is None:
                point.guided = shown - without - scale * (shown - point.prediction - without)
            else:
                point.guided = guide(point.prediction, shown - without, shown)
            point.unconditional = (latents, unconditional) if plus else None

    def keep(self, site: Site, grid: tuple[int, int], features: Features) -> Features:
        return features


def check_level(what: str, sigmas: Tensor, sigma: float) -> None:
    """Raises ValueError, calling the trajectory `what`, when a noise level lies outside of its falling `sigmas`."""
    first, last = float(sigmas[0]), float(sigmas[-1])
    inside = last <= sigma <= first or any(math.isclose(sigma, end, rel_tol=1e-5) for end in (first, last))
    if not inside:
        raise ValueError(
            f"{what} runs from sigma {first:.4g} to {last:.4g} but is needed at {sigma:.4g}; invert the picture with "
            "sigmas that begin as high as the sampler's and end as low."
        )


def step_by_the_unconditional(
    clean: Tensor, latents: Tensor, unconditional: Tensor, sigma: float, following: float, noise_scaling: NoiseScaling
) -> Tensor:
    """A step of CFG++ (Chung et al. 2024): the guided prediction `clean`, noised to `following` with the noise that
    some latents have by their unconditional prediction at `sigma`."""
    mean = noise_scaling(sigma, torch.zeros_like(latents), unconditional)
    return noise_scaling(following, (latents - mean) / sigma, clean)
