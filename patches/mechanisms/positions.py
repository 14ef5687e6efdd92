"""Where the keys of a reference stand, for a picture that attends to them, in models that know places by rotations.

A reference is run by itself, so its keys have the places of its own picture, which are also those of the generation: a
query finds what stands at its own place first. A smaller reference so lies in the picture's corner, where most models
count from. Four ways are known: leave it so; turn the keys until its middle lies in that of the places that see it, or
until it lies beside the picture (AnyStory's are moved by the reference's width); weaken in them what says where exactly
they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.call import AttentionCall
from ..engine.streams import NoisedReference
from ..families import Transformer
from ..families.rope import Rope

SAME, CENTRED, BESIDE, DAMPED = "same", "centred", "beside", "damped"
# The axes of a model's rotations along which a picture is high and wide.
_IN_THE_PICTURE = (1, 2)


def damping(rates: Tensor, side: int) -> Tensor:
    """The weight of each pair of channels (pairs) of 0 to 1 in damped keys, of rates (axes, pairs) in radians a token
    and a picture whose longer side has `side` tokens.

    A pair that turns once in the picture or less keeps its weight; one that turns n times has 1 / n. What turns along
    no side of the picture says nothing of places, and stays."""
    turns = rates[list(_IN_THE_PICTURE)].amax(0) * side / (2 * math.pi)
    return 1 / turns.clamp(min=1)


@dataclass(frozen=True, eq=False)
class Positions:
    """How keys of references are placed: `mode` is CENTRED, BESIDE or DAMPED, `family` and `rope` the model's."""

    mode: str
    family: Transformer
    rope: Rope

    def placed(
        self, key: Tensor, call: AttentionCall, reference: NoisedReference, taken: int, route: Tensor | None = None
    ) -> Tensor:
        """A reference's keys (rows, n, channels), as the picture of a call should see them; `taken` columns of tokens
        beside the picture are other references', and `route` (1 or rows, queries) says which queries see them."""
        if self.mode == DAMPED:
            return self.rope.weighted(key, call.heads, damping(self.rope.rates_at(key), max(call.grid)))
        theirs = self.grid(reference)
        first, own = self.family.first(call.grid), self.family.first(theirs)
        if self.mode == BESIDE:
            # The last column touches the picture's first.
            return self._moved(key, call.heads, (0, first[1] - own[1] - theirs[1] - taken))
        shifts = [
            tuple(f - o + c for f, o, c in zip(first, own, corner, strict=True))
            for corner in corners(call.grid, theirs, route)
        ]
        if len(set(shifts)) == 1:
            return self._moved(key, call.heads, shifts[0])
        rows = key.expand(len(shifts), -1, -1).split(1)
        return torch.cat([self._moved(row, call.heads, shift) for row, shift in zip(rows, shifts, strict=True)])

    def _moved(self, key: Tensor, heads: int, steps: tuple[int, int]) -> Tensor:
        """Keys so many rows and columns further."""
        shift = [0] * len(self.rope.rates)
        for axis, step in zip(_IN_THE_PICTURE, steps, strict=True):
            shift[axis] = step
        return self.rope.rotated(key, heads, shift) if any(steps) else key

    def grid(self, reference: NoisedReference) -> tuple[int, int]:
        """The (height, width) of a reference's tokens."""
        return self.family.grid((reference.shape[-2], reference.shape[-1]))


def corners(grid: tuple[int, int], theirs: tuple[int, int], route: Tensor | None) -> list[tuple[int, int]]:
    """The row and column of a picture's grid (height, width) where a reference of the tokens `theirs` begins, so that
    its middle is where the middle of the places that see it is, for each row of `route` (1 or rows, queries of the
    grid) of bool; without one the picture's. Whole steps: keys between two places are none that a model knows."""
    if route is None:
        middles = [[(side - 1) / 2 for side in grid]]
    else:
        middles = [places.nonzero().double().mean(0).tolist() for places in route.unflatten(-1, grid)]
    found = []
    for middle in middles:
        starts = [each - (side - 1) / 2 for each, side in zip(middle, theirs, strict=True)]
        found.append(tuple(math.ceil(start - 0.5) if math.isfinite(start) else 0 for start in starts))
    return found


def placed_keys(
    positions: Positions | None,
    call: AttentionCall,
    given: list[tuple[NoisedReference, Tensor]],
    route: Tensor | None = None,
) -> list[Tensor]:
    """The keys of several references that are seen together by the queries of `route` (1 or rows, queries), each in a
    place of its own; without `positions` as they are."""
    if positions is None:
        return [key for _, key in given]
    keys, taken = [], 0
    for reference, key in given:
        keys.append(positions.placed(key, call, reference, taken, route))
        taken += positions.grid(reference)[1]
    return keys
