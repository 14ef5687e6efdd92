"""A subject's picture as AnyStory's encoders take it: cut out, square, resized by Pillow, everything else mid grey.

Equal to the authors' code in every value: they resize bytes, and a resize of floating point numbers differs.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

# What the authors' example application takes for the subject, of a mask in bytes, and leaves around it.
THRESHOLD, MARGIN = 200, 1.04


def to_bytes(values: Tensor) -> np.ndarray:
    """A picture (height, width, 3) or mask (height, width) of 0 to 1 in bytes."""
    return (values.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def cut_out(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A square around the subject, 4 % wider than it, which may reach beyond the picture: `image` (height, width, 3)
    and `mask` (height, width), both in bytes. The mask becomes black and white, and the picture white outside it, as
    in the authors' example application.

    Raises ValueError where the mask is nowhere bright enough."""
    inside = mask > THRESHOLD
    rows, columns = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
    if len(rows) == 0:
        raise ValueError(
            f"The subject's mask is empty: none of its {mask.shape[1]} x {mask.shape[0]} places is above "
            f"{THRESHOLD / 255:.2f}. Paint the subject white, or invert the mask."
        )
    y0, y1, x0, x1 = int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])
    side = max(x1 - x0, y1 - y0) * MARGIN
    left, top = (x0 + x1) // 2 - side // 2, (y0 + y1) // 2 - side // 2
    box = tuple(round(edge) for edge in (left, top, left + side, top + side))
    box = (box[0], box[1], max(box[2], box[0] + 1), max(box[3], box[1] + 1))
    cropped = Image.fromarray(np.uint8(inside) * 255).crop(box)
    picture, kept = np.array(Image.fromarray(image).crop(box)), np.asarray(cropped)
    picture[kept == 0] = 255
    return picture, kept


def pixels(image: np.ndarray, mask: np.ndarray, size: int, filter_: Image.Resampling) -> tuple[Tensor, Tensor]:
    """A picture of `size` squared in -1 to 1, multiplied by its mask (1, 3, size, size), and that mask of 0 to 1
    (1, 1, size, size), from both in bytes. The aspect ratio is not kept."""
    square = (size, size)
    values = torch.from_numpy(np.array(Image.fromarray(image).resize(square, filter_))).float() / 255
    shares = torch.from_numpy(np.array(Image.fromarray(mask).resize(square, Image.Resampling.NEAREST))).float() / 255
    return ((values.movedim(-1, 0) - 0.5) / 0.5 * shares)[None], shares[None, None]


def vision_pixels(image: np.ndarray, mask: np.ndarray, size: int) -> tuple[Tensor, Tensor]:
    """What the SigLIP vision model sees of a subject; see `pixels`."""
    return pixels(image, mask, size, Image.Resampling.BICUBIC)


def latent_pixels(image: np.ndarray, mask: np.ndarray, size: int) -> tuple[Tensor, Tensor]:
    """What the VAE sees of a subject; see `pixels`."""
    return pixels(image, mask, size, Image.Resampling.LANCZOS)


def places(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which cells of a grid a mask (1, 1, height, width) touches at all: (1, cells) of 0 and 1."""
    return (functional.adaptive_avg_pool2d(mask, grid) > 0).float().flatten(1)
