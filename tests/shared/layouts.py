"""What the tests of layouts share."""

from __future__ import annotations

import torch
from torch import Tensor


def box(width: int, height: int, x0: int, y0: int, x1: int, y1: int) -> Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def resampled(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bilinear with aligned corners by its definition, (height, width) to (places), in float64."""

    def weights(count: int, length: int) -> Tensor:
        at = torch.arange(count, dtype=torch.float64) * ((length - 1) / max(count - 1, 1))
        return (1 - (at[:, None] - torch.arange(length)).abs()).clamp(min=0)

    return (weights(grid[0], values.shape[0]) @ values.double() @ weights(grid[1], values.shape[1]).T).flatten()
