"""Training pictures: from the host's IMAGE links to latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.utils import common_upscale
from torch import Tensor

from ..patches.subject import composite, encoded


def pictures_of(images: Sequence[Tensor]) -> list[Tensor]:
    """The single pictures (1, h, w, 3) of a list of IMAGE batches; transparent places become white."""
    return [composite(image[number : number + 1], None)[0] for image in images for number in range(len(image))]


def square(picture: Tensor, size: int) -> Tensor:
    """The middle square of a picture (1, h, w, 3), `size` pixels wide."""
    planes = common_upscale(picture.movedim(-1, 1), size, size, "bicubic", "center")
    return planes.movedim(1, -1).clamp(0, 1)


def latents_of(vae: Any, pictures: Sequence[Tensor]) -> Tensor:
    """The latents (n, channels, h / 8, w / 8) of pictures of one size, as the VAE gives them, for autograd to use."""
    with torch.no_grad():
        named = [(each, f"training picture {number}") for number, each in enumerate(pictures, 1)]
        return torch.cat([encoded(vae, picture, name) for picture, name in named]).clone()
