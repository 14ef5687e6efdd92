"""Where in the picture an edit acts: masks of the generation, at the places of an attention layer's queries."""

from __future__ import annotations

from torch import Tensor

from .call import AttentionCall, Chunk
from .rows import in_turn
from .streams import resize_mask


def region_at(mask: Tensor, chunk: Chunk, grid: tuple[int, int], rows: int) -> Tensor:
    """A region (1 or batch, height, width) of 0 to 1, any size, as (1 or rows, queries) at a layer's grid.

    Where area conditioning crops the latent, the region is cropped the same way. A batch of regions goes with the
    batch of latents in order, from the first again after the last."""
    mask = resize_mask(mask, chunk.latent) if chunk.area is not None else mask
    if chunk.area is not None:
        height, width, y, x = chunk.area
        mask = mask[:, y : y + height, x : x + width]
    mask = resize_mask(mask, grid).flatten(1)
    if len(mask) == 1:
        return mask
    return in_turn(mask, rows)


def tokens_at(tokens: Tensor, call: AttentionCall) -> Tensor:
    """What of a whole picture's tokens (rows, height, width, channels) lies where a call's chunk is, whose latent area
    conditioning may have cropped: (rows, queries, channels), to the nearest token. The call has a grid."""
    height, width = call.grid
    _, _, y, x = call.chunk.area or (0, 0, 0, 0)
    top = min(round(y * tokens.shape[1] / call.chunk.latent[0]), tokens.shape[1] - height)
    left = min(round(x * tokens.shape[2] / call.chunk.latent[1]), tokens.shape[2] - width)
    return tokens[:, top : top + height, left : left + width].flatten(1, 2)
