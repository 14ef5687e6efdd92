"""Training pictures: from the host's IMAGE links to latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.utils import common_upscale
from torch import Tensor

from ..patches.mechanisms.subject import composite, encoded


def pictures_of(images: Sequence[Tensor]) -> list[Tensor]:
    """The single pictures (1, h, w, 3) of a list of IMAGE batches; transparent places become white."""
    return [composite(image[number : number + 1], None)[0] for image in images for number in range(len(image))]


def square(picture: Tensor, size: int) -> Tensor:
    """The middle square of a picture (1, h, w, 3), `size` pixels wide."""
    planes = common_upscale(picture.movedim(-1, 1), size, size, "bicubic", "center")
    return planes.movedim(1, -1).clamp(0, 1)


def varied(
    picture: Tensor, count: int, smallest_crop: float, image_noise: float, generator: torch.Generator
) -> list[Tensor]:
    """`count` versions of a square picture (1, h, w, 3) of 0 to 1, of its size: a random square part, `smallest_crop`
    to 1 of its side, with Gaussian noise of that standard deviation. The first is the picture itself."""
    side = picture.shape[1]
    made = [picture]
    for _ in range(count - 1):
        share, down, across = torch.rand(3, generator=generator).tolist()
        part = max(round(side * (smallest_crop + (1 - smallest_crop) * share)), 1)
        top, left = round(down * (side - part)), round(across * (side - part))
        planes = picture[:, top : top + part, left : left + part].movedim(-1, 1)
        resized = torch.nn.functional.interpolate(planes, (side, side), mode="bicubic", antialias=True).movedim(1, -1)
        noise = torch.randn(resized.shape, generator=generator).to(resized)
        made.append((resized + image_noise * noise).clamp(0, 1))
    return made


def with_mirrored(versions: Sequence[Tensor]) -> list[Tensor]:
    """Pictures (1, h, w, 3), and then each of them with left and right exchanged: drawn evenly, half are mirrored."""
    return [*versions, *(each.flip(2) for each in versions)]


def version_latents(vae: Any, versions: Sequence[Sequence[Tensor]], channels: int, mirrored: bool) -> Tensor:
    """The latents (pictures, versions, channels, h / 8, w / 8) of versions of each picture, as many of each; with
    `mirrored` the mirrored ones stand behind them. See `latents_of`."""
    return torch.stack([latents_of(vae, with_mirrored(each) if mirrored else each, channels) for each in versions])


def latents_of(vae: Any, pictures: Sequence[Tensor], channels: int) -> Tensor:
    """The latents (n, channels, h / 8, w / 8) of pictures of one size, as the VAE gives them, for autograd to use.

    Raises ValueError at the first where they are not those of a model with as many latent `channels`."""
    made = []
    with torch.no_grad():
        for number, picture in enumerate(pictures, 1):
            made.append(encoded(vae, picture, f"training picture {number}"))
            check_latents(made[-1], channels)
        return torch.cat(made).clone()


def check_latents(latents: Tensor, channels: int) -> None:
    """Raises ValueError unless a VAE's latents are those of pictures (n, channels, h / 8, w / 8) with as many
    `channels`."""
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(
            f"The VAE gives latents of the shape {tuple(latents.shape)}, but this model takes pictures of {channels} "
            "channels; use the VAE of this checkpoint."
        )
