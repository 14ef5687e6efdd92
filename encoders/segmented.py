"""A subject's picture as AnyStory's encoders on U-Nets take it: cut out, centred in a square."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def segmented(
    image: Tensor, mask: Tensor, size: int, mean: Sequence[float] = (0.5,) * 3, std: Sequence[float] = (0.5,) * 3
) -> tuple[Tensor, Tensor]:
    """Pictures (n, height, width, 3) of 0 to 1, normalised to (image - mean) / std and times their masks (n, height,
    width) of 0 to 1, in a square (n, 3, size, size), and the masks in it (n, size, size).

    What is cut out, and what fills the square up, is zero after normalisation, as in AnyStory's code: mid grey, of a
    mean of one half. The authors squeeze the subject into the square; here it keeps its form."""
    centre, scale = (image.new_tensor(each).view(1, 3, 1, 1).float() for each in (mean, std))
    inside = mask[:, None].to(image.device, torch.float32)
    planes = torch.cat([(image.movedim(-1, 1).float() - centre) / scale * inside, inside], 1)
    height, width = planes.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    planes = functional.pad(planes, (left, side - width - left, top, side - height - top))
    if side != size:
        planes = functional.interpolate(planes, (size, size), mode="bicubic", antialias=side > size)
    return planes[:, :3], planes[:, 3].clamp(0, 1)
