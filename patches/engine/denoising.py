"""The companion stream that denoises by itself: DCI's auxiliary branch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..parts.cache import FeatureCache, Features
from ..parts.sites import Site
from .streams import NoiseScaling, Pass

# (the conditioned prediction, the unconditioned one, the latents they are of) -> the guided prediction.
Guide = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    how: Pass = field(default_factory=Pass)
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


def step_by_the_unconditional(
    clean: Tensor, latents: Tensor, unconditional: Tensor, sigma: float, following: float, noise_scaling: NoiseScaling
) -> Tensor:
    """A step of CFG++ (Chung et al. 2024): the guided prediction `clean`, noised to `following` with the noise that
    some latents have by their unconditional prediction at `sigma`."""
    mean = noise_scaling(sigma, torch.zeros_like(latents), unconditional)
    return noise_scaling(following, (latents - mean) / sigma, clean)
