"""Self-recurrence (the published code of Cones 2, in no equation of the paper): a sampler's step is done again after
its result was noised back to where it began, so that the layout acts more than once at each noise level."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..parts.process import Process

# (x, the two noise levels of a step, its number, its turn) -> x at the second level.
Step = Callable[[Tensor, Tensor, int, int], Tensor]


def recur(
    step: Step,
    x: Tensor,
    sigmas: Tensor,
    turns: Callable[[float], int],
    noise: Callable[[Tensor, int, int], Tensor],
    process: Process,
) -> Tensor:
    """Every step of a falling schedule `sigmas` (n + 1), each `turns(sigma)` times. `noise` is asked, like x, for a
    step's number and turn, the first of which needs none. `process` is the model's."""
    for number in range(len(sigmas) - 1):
        for turn in range(max(turns(float(sigmas[number])), 1)):
            if turn:
                x = process.renoised(x, sigmas[number + 1], sigmas[number], noise(x, number, turn))
            x = step(x, sigmas[number : number + 2], number, turn)
    return x


def row_noise(like: Tensor, seed: int, *place: int | str) -> Tensor:
    """Noise of the shape of `like`, by a seed and a place such as a step's number and turn. A row's depends on these
    and its own number only, not on how many rows there are."""
    rows = []
    for row in range(len(like)):
        digest = hashlib.blake2b(" ".join(map(str, (seed, *place, row))).encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        rows.append(torch.randn(like.shape[1:], generator=generator))
    return torch.stack(rows).to(like)
