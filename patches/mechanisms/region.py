"""Where in the picture an edit acts: masks of the generation, at the places of an attention layer's queries."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from ..engine.call import AttentionCall
from ..engine.chunk import Chunk
from ..parts.masks import resize_mask


def region_at(mask: Tensor, chunk: Chunk, grid: tuple[int, int], rows: int) -> Tensor:
    """A region (1 or batch, height, width) of 0 to 1, any size, as (1 or rows, queries) at a layer's grid.

    Where area conditioning or a tile crops the latent, the region is cropped the same way. A batch of regions goes with
    the batch of latents in order, from the first again after the last."""
    if chunk.size != chunk.latent or chunk.lines is not None:
        mask = chunk.cut(resize_mask(mask, chunk.latent))
    mask = resize_mask(mask, grid).flatten(1)
    return mask if len(mask) == 1 else chunk.lent(mask, rows)


@dataclass
class Regions:
    """What `region_at` gave of one mask for the calls of a run: a layer's is the same at every step."""

    _mask: Tensor | None = None
    _made: dict[Hashable, Tensor] = field(default_factory=dict)

    def at(self, mask: Tensor, call: AttentionCall, device: torch.device) -> Tensor:
        """The region at a call's places, on a device: (1 or rows, queries). Another mask takes the place of the last.
        The call has a grid."""
        if mask is not self._mask:
            self._mask, self._made = mask, {}
        chunk, rows = call.chunk, call.shape[0]
        place = (call.grid, chunk.part, chunk.latent, rows, device)
        if place not in self._made:
            self._made[place] = region_at(mask, chunk, call.grid, rows).to(device)
        return self._made[place]


def tokens_at(tokens: Tensor, call: AttentionCall) -> Tensor:
    """What of a whole picture's tokens (rows, height, width, channels) lies where a call's chunk is, which may be part
    of the picture: (rows, queries, channels), to the nearest token. Tokens of a picture of another size are stretched
    to this one's. The call has a grid."""
    chunk, grid = call.chunk, call.grid
    if chunk.size == chunk.latent and chunk.lines is None:
        return stretched(tokens, grid).flatten(1, 2)
    whole = [round(side * here / own) for side, here, own in zip(chunk.latent, grid, chunk.size, strict=True)]
    # Sides that no stride divides are rounded in their own ways.
    if any(abs(side - count) > 1 for side, count in zip(whole, tokens.shape[1:3], strict=True)):
        tokens = stretched(tokens, (whole[0], whole[1]))
    starts = () if chunk.area is None else zip(chunk.area[2:], chunk.size, strict=True)
    lines = chunk.lines or tuple(tuple(range(start, start + count)) for start, count in starts)
    for dimension, (numbers, count) in enumerate(zip(lines, grid, strict=True), 1):
        scale = tokens.shape[dimension] / chunk.latent[dimension - 1]
        middles = [(each + 0.5) * len(numbers) / count for each in range(count)]
        # The middle of what a token stands for, in the part; from the line there to that of the whole picture.
        exact = [numbers[min(int(each), len(numbers) - 1)] + each - int(each) for each in middles]
        nearest = [min(int(each * scale), tokens.shape[dimension] - 1) for each in exact]
        tokens = tokens.index_select(dimension, torch.tensor(nearest, device=tokens.device))
    return tokens.flatten(1, 2)


def stretched(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (rows, height, width, channels) at another grid, bilinear."""
    if tuple(tokens.shape[1:3]) == tuple(grid):
        return tokens
    moved = functional.interpolate(tokens.movedim(-1, 1).float(), tuple(grid), mode="bilinear", antialias=True)
    return moved.movedim(1, -1).to(tokens.dtype)
