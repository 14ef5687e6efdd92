"""SUBJECT: reference pictures of one subject, ready for any mechanism, and the features they have given so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..parts.cache import MEGABYTE, FeatureCache
from ..parts.masks import resize_mask
from ..parts.window import Window
from .encoded_subject import EncodedSubject
from .image_prompt import AdaptedPrompt, TokenPrompt


@dataclass(frozen=True, eq=False)
class Reference:
    """One picture of a subject: `image` (1, height, width, 3) of 0 to 1 as it was encoded, `latents` as the VAE gave
    them (1, channels, height / 8, width / 8), `mask` (1, height / 8, width / 8) of 0 to 1 or None for all of it, and
    the same `pixel_mask` (1, height, width). `pixels` is the (height, width) that the cropped picture had before it
    was resized, None that of `image`. Without `cut_out` the masks say only what of the picture was filled up."""

    image: Tensor
    latents: Tensor
    mask: Tensor | None
    pixel_mask: Tensor | None = None
    pixels: tuple[int, int] | None = None
    cut_out: bool = False


@dataclass(frozen=True, eq=False)
class Share:
    """One subject's share in a routed injection: `strength` multiplies the attention weights of its references (0 is
    none; its logarithm is Eq. 7's gamma of AnyStory), inside `window`; `prompt` is an image prompt of it, with `eta` of
    Eq. 5, or None."""

    strength: float = 1.0
    window: Window = field(default_factory=Window)
    prompt: TokenPrompt | AdaptedPrompt | None = None
    eta: float = 1.0


@dataclass(frozen=True, eq=False)
class Subject:
    """A subject: its references, the phrase that names it in prompts ("" if none), its features between runs, its share
    where several subjects are routed, and what a trained encoder made of it, which then stands for its references.

    The value on a SUBJECT link is a tuple of these."""

    references: tuple[Reference, ...]
    phrase: str
    cache: FeatureCache = field(default_factory=lambda: FeatureCache(2048 * MEGABYTE))
    share: Share = field(default_factory=Share)
    encoded: EncodedSubject | None = None

    @property
    def prompt(self) -> TokenPrompt | AdaptedPrompt | None:
        """Its image prompt: the one it was given, or else its encoder's tokens."""
        return self.share.prompt if self.share.prompt is not None or self.encoded is None else self.encoded.prompt


def encoded(vae: Any, picture: Tensor, what: str) -> Tensor:
    """A host VAE's latents of a picture (1, height, width, 3). Raises ValueError, calling the picture `what`, when they
    are not finite, as those of some VAEs in half precision."""
    latents = vae.encode(picture)
    if not bool(latents.isfinite().all()):
        raise ValueError(
            f"The VAE gave values that are no numbers for {what}; use another VAE, or start ComfyUI with --fp32-vae."
        )
    return latents


def composite(image: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(n, h, w, 3 or 4) to (n, h, w, 3): transparent places become white, and without a mask the opacity is the mask
    (n, h, w). An opacity of one everywhere is no mask; a mask of another size is brought to the pictures'."""
    if mask is not None and mask.shape[1:] != image.shape[1:3]:
        mask = resize_mask(mask, tuple(image.shape[1:3]))
    if image.shape[-1] != 4:
        return image[..., :3], mask
    opacity = image[..., 3]
    flat = image[..., :3] * opacity[..., None] + (1 - opacity[..., None])
    return flat, opacity if mask is None and bool((opacity < 1).any()) else mask


def mask_bounds(mask: Tensor, margin: float) -> tuple[int, int, int, int]:
    """The box x0, y0, x1, y1 (exclusive) around where a mask (h, w) is above one half, wider on each side by `margin`
    times its longer side, inside the picture. Raises ValueError when the mask is nowhere above one half."""
    rows, columns = (mask > 0.5).any(1).nonzero(), (mask > 0.5).any(0).nonzero()
    if len(rows) == 0:
        raise ValueError(
            f"The subject's mask is empty: no place of its {mask.shape[1]} x {mask.shape[0]} is above one half. "
            "Paint the subject white, or invert the mask."
        )
    y0, y1, x0, x1 = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    space = round(margin * max(y1 - y0, x1 - x0))
    height, width = mask.shape
    return max(x0 - space, 0), max(y0 - space, 0), min(x1 + space, width), min(y1 + space, height)


def fitted_size(height: int, width: int, longer: int) -> tuple[int, int]:
    """The size with `longer` as its longer side and the aspect ratio of (height, width)."""
    scale = longer / max(height, width)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def fit(image: Tensor, mask: Tensor | None, longer: int, unit: int) -> tuple[Tensor, Tensor | None]:
    """Resizes one picture (1, h, w, 3) to `longer` pixels on its longer side, aspect ratio kept, and fills it up to
    multiples of `unit` with its edge. The mask (1, h, w) goes along and is 0 in what was filled up; without one, a
    mask appears only if something was filled up."""
    size = fitted_size(image.shape[1], image.shape[2], longer)
    shrinks = size[0] < image.shape[1]
    planes = functional.interpolate(image.movedim(-1, 1), size, mode="bicubic", antialias=shrinks).clamp(0, 1)
    fill = (-size[1] % unit, -size[0] % unit)
    planes = functional.pad(planes, (0, fill[0], 0, fill[1]), mode="replicate")
    if mask is None and any(fill):
        mask = torch.ones_like(image[..., 0])
    if mask is not None:
        mask = functional.interpolate(mask[:, None].float(), size, mode="area" if shrinks else "bilinear")
        mask = functional.pad(mask, (0, fill[0], 0, fill[1]))[:, 0]
    return planes.movedim(1, -1), mask
