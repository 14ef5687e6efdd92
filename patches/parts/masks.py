"""Masks at the cells of a grid."""

from __future__ import annotations

import torch
from torch import Tensor


def resize_mask(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """A mask (rows, height, width) of 0 to 1 averaged over the cells of a grid: (rows, *grid)."""
    return torch.nn.functional.interpolate(mask[:, None].float(), grid, mode="area")[:, 0]


def tokens_inside(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which cells of a grid lie at least half inside a mask (rows, height, width): (rows, cells) bool. A row with no
    such cell takes the cell it covers most, so a small subject is never lost at a coarse site."""
    cover = resize_mask(mask, grid).flatten(1)
    inside = cover >= 0.5
    most = torch.zeros_like(inside).scatter_(1, cover.argmax(1, keepdim=True), True)
    return torch.where(inside.any(1, keepdim=True), inside, most)


def lending(mask: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """What of the cells of a grid lends when only those inside masks (pictures, height, width) do: the numbers of the
    cells that are inside of some mask, and what to add to their logits, (pictures, 1, numbers): minus infinity where a
    cell is not inside its own picture's; None where all masks agree. No other cell is needed: attention over these is
    exactly that over all with the outside masked."""
    inside = tokens_inside(mask, grid)
    some = inside.any(0).nonzero().squeeze(1)
    own = inside[:, some]
    if bool(own.all()):
        return some, None
    return some, torch.zeros(own.shape).masked_fill_(~own, -torch.inf)[:, None]
