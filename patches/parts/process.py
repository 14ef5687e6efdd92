"""What a noise level means: the sigmas of diffusion, and those of a flow.

Latents at sigma are clean + sigma * noise in the host's diffusions, and (1 - sigma) * clean + sigma * noise in a flow,
whose sigma goes from 1 to 0. In both, (x - prediction) / sigma is the direction of a line in sigma, so steps, paths and
guidance are the same. What speaks of the noise's share of the picture differs, and is here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Stable Diffusion's highest sigma. A flow begins without any signal, where the ratio has no bound.
HIGHEST = 14.6146


@dataclass(frozen=True)
class Process:
    """How latents get their noise: a diffusion's, or a `flow`'s, whose noise the host may multiply by `scale`. `spread`
    is the standard deviation that a diffusion's clean latents are taken to have."""

    flow: bool = False
    scale: float = 1.0
    spread: float = 1.0

    @classmethod
    def of(cls, model_sampling: Any) -> Process:
        """That of a MODEL's model_sampling. Cosmos-Predict2 is trained as a flow, but the host samples it as a
        diffusion."""
        from comfy.model_sampling import CONST

        flow = isinstance(model_sampling, CONST)
        if flow:
            return cls(True, float(getattr(model_sampling, "noise_scale", 1.0)))
        return cls(spread=float(model_sampling.sigma_data))

    def ratio(self, sigma: float) -> float:
        """Noise over signal: what equations of diffusion call sigma. A flow's, sigma / (1 - sigma), is not let above
        the highest that Stable Diffusion has, for which the papers' code is made."""
        if not self.flow:
            return sigma
        most = HIGHEST / (self.scale + HIGHEST)
        return HIGHEST if sigma >= most else self.scale * sigma / (1 - sigma)

    def renoised(self, x: Tensor, low: Tensor, high: Tensor, noise: Tensor) -> Tensor:
        """Latents at the level `low` taken back to `high`, which is no lower, with as much noise as that takes: the
        clean part is scaled as the level has it, and the variances add up."""
        if not self.flow:
            return x + (high**2 - low**2).clamp(min=0).sqrt() * noise
        kept = (1 - high) / (1 - low)
        return kept * x + self.scale * (high**2 - (kept * low) ** 2).clamp(min=0).sqrt() * noise

    def first_guess(self, below: Tensor, sigma: float, following: float) -> Tensor:
        """Where DDIM inversion asks the model instead of at the unknown latents: what the network saw at `sigma` is
        taken for what it will see at `following`. A diffusion's network sees latents of unit variance, a flow's the
        latents themselves."""
        if self.flow:
            return below
        own = self.spread**2
        return below * math.sqrt((own + following**2) / (own + sigma**2))


DIFFUSION = Process()
