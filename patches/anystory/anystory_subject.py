"""What AnyStory knows of one subject, encoded once for any number of runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..parts.cache import MEGABYTE, FeatureCache


@dataclass(frozen=True, eq=False)
class AnyStorySubject:
    """One subject: `tokens` of its own (1, n, context), unscaled, and `router` tokens (1, m, context); its `latents` as
    the VAE gave them (1, channels, height, width), and which of their tokens it touches, `inside` (1, height / 2 *
    width / 2) of 0 and 1. `cache` keeps what its reference gives.

    The value on a link is a tuple of these."""

    tokens: Tensor
    router: Tensor
    latents: Tensor
    inside: Tensor
    cache: FeatureCache = field(default_factory=lambda: FeatureCache(2048 * MEGABYTE))
