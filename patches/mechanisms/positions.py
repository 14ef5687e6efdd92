"""Where the keys of a reference stand, for a picture that attends to them, in models that know places by rotations.

A reference is run by itself, so its keys have the places of its own picture, which are also those of the generation: a
query finds what stands at its own place first. Three ways are known: leave it so; turn the keys to places beside the
picture (AnyStory's are moved by the reference's width); weaken in them what says where exactly they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..engine.call import AttentionCall
from ..engine.streams import NoisedReference
from ..families import Transformer
from ..families.rope import Rope

SAME, BESIDE, DAMPED = "same", "beside", "damped"
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
    """How keys of references are placed: `mode` is BESIDE or DAMPED, `family` and `rope` the model's."""

    mode: str
    family: Transformer
    rope: Rope

    def placed(self, key: Tensor, call: AttentionCall, reference: NoisedReference, taken: int) -> Tensor:
        """A reference's keys (rows, n, channels), as the picture of a call should see them; `taken` columns of tokens
        beside the picture are other references'."""
        if self.mode == DAMPED:
            return self.rope.weighted(key, call.heads, damping(self.rope.rates, max(call.grid)))
        shift = list(self.family.beside(self.grid(reference), call.grid))
        shift[_IN_THE_PICTURE[1]] -= taken
        return self.rope.rotated(key, call.heads, shift)

    def grid(self, reference: NoisedReference) -> tuple[int, int]:
        """The (height, width) of a reference's tokens."""
        return self.family.grid((reference.shape[-2], reference.shape[-1]))


def placed_keys(
    positions: Positions | None,
    call: AttentionCall,
    given: list[tuple[NoisedReference, Tensor]],
) -> list[Tensor]:
    """The keys of several references that are seen together, each in a place of its own; without `positions` as they
    are."""
    if positions is None:
        return [key for _, key in given]
    keys, taken = [], 0
    for reference, key in given:
        keys.append(positions.placed(key, call, reference, taken))
        taken += positions.grid(reference)[1]
    return keys
