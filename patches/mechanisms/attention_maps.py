"""Cross-attention maps: how much each place of a picture attends to a phrase of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..engine.call import AttentionCall
from ..engine.chunk import Chunk


def attention_maps(call: AttentionCall, groups: Sequence[Sequence[int]]) -> Tensor | None:
    """The attention to groups of a prompt's tokens: (rows, groups, height, width) of 0 to 1 in float32, averaged over
    heads, summed over a group's tokens and over the repetitions of a prompt that the host repeats. Of a joint attention
    it is the softmax over the prompt's keys, as if these were all.

    None where another pack changed the places or the tokens inside the layer, or another node put other keys there."""
    if call.grid is None or not call.reads:
        return None
    length = call.chunk.length
    chosen = torch.zeros(length, len(groups), device=call.device)
    chosen[[t for group in groups for t in group], [n for n, group in enumerate(groups) for _ in group]] = 1

    chosen = chosen.repeat((call.prompt.stop - call.prompt.start) // length, 1)
    parts = [shares.mean(1) @ chosen for shares in call.probabilities_in_parts(call.prompt)]
    return torch.cat(parts, 1).mT.unflatten(-1, call.grid)


def spread_out(maps: Tensor, chunk: Chunk) -> Tensor:
    """Maps (rows, n, *size) of a chunk that may be part of the picture, at its places of all of it and, of a tile, at
    its rows of the run's batch: (rows or pictures, n, *latent), 0 elsewhere."""
    if chunk.part == (None, None, None):
        return maps
    count = len(maps) if chunk.pictures is None else chunk.count
    canvas = maps.new_zeros((count, maps.shape[1], *chunk.latent))
    rows = range(len(maps)) if chunk.pictures is None else chunk.pictures
    if chunk.lines is None:
        for row, each in zip(rows, maps, strict=True):
            chunk.cut(canvas[row]).copy_(each)
        return canvas
    down, across = (torch.tensor(each, device=maps.device) for each in chunk.lines)
    for row, each in zip(rows, maps, strict=True):
        canvas[row, :, down[:, None], across] = each
    return canvas


@dataclass
class MeanMap:
    """The mean of the maps it is told of, in the shape of the last one: a sampler may change a picture's size."""

    value: Tensor
    count: int = 1

    def add(self, value: Tensor) -> None:
        self.count += 1
        before = self.value if self.value.ndim < 3 else resized(self.value, value.shape[-2:])
        self.value = before + (value - before) / self.count


def normalised(maps: Tensor) -> Tensor:
    """Each map (..., height, width) stretched to 0 to 1 by its own smallest and largest value; one that is the same
    everywhere becomes 0."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)


def smoothed(maps: Tensor, share: float) -> Tensor:
    """Maps (rows, n, height, width) blurred by a Gaussian whose standard deviation is `share` of their shorter side."""
    deviation = share * min(maps.shape[-2:])
    # Below this a Gaussian's neighbours weigh less than one part in a million.
    if deviation < 0.19:
        return maps
    from kornia.filters import gaussian_blur2d

    # The border is repeated, and a kernel may reach over all of it.
    size = 2 * min(int(3 * deviation) + 1, *maps.shape[-2:]) + 1
    return gaussian_blur2d(maps, (size, size), (deviation, deviation), border_type="replicate")


def resized(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps (rows, n, height, width) at another grid: bilinear, averaged where it is coarser."""
    if tuple(maps.shape[-2:]) == tuple(grid):
        return maps
    return functional.interpolate(maps, grid, mode="bilinear", antialias=True)
