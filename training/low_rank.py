"""A change of weights as the product of two thin matrices, as LoRA files hold it.

The best approximation of a matrix by one of a rank is that of its largest singular values (Eckart and Young 1936); what
it misses is the root of the sum of the squares of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor


def singular(change: Tensor) -> tuple[Tensor, Tensor]:
    """The left singular vectors (out, k) and singular values (k), falling, of a change (out, in), in float64.

    By the eigenvectors of change times its transpose, on the smaller side: many times faster than the decomposition
    itself, and as exact as files in half precision need."""
    whole = change.double()
    tall = whole.shape[0] > whole.shape[1]
    squares = whole.T @ whole if tall else whole @ whole.T
    values, vectors = torch.linalg.eigh(squares)
    values, vectors = values.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    if tall:
        vectors = whole @ vectors / values.clamp(min=torch.finfo(torch.float64).tiny)
    return vectors, values


def rank_for(values: Tensor, error: float) -> int:
    """The least rank, at least 1, at which what is left out is at most `error` times the whole; of falling singular
    values."""
    left = values.square().flip(0).cumsum(0).flip(0)
    enough = left <= error**2 * left[0]
    return max(int(enough.int().argmax()) if bool(enough.any()) else len(values), 1)


def factors(change: Tensor, rank: int, error: float) -> tuple[Tensor, Tensor] | None:
    """`change` (out, in) as up (out, rank) times down (rank, in), both float32 and of like size in their values; `rank`
    0 takes the least that misses no more than `error`, as a share of the change. None where two such matrices are no
    smaller than the change itself."""
    vectors, values = singular(change)
    rank = min(rank or rank_for(values, error), len(values))
    if rank * sum(change.shape) >= change.numel():
        return None
    roots = values[:rank].sqrt()
    up = vectors[:, :rank] * roots
    down = vectors[:, :rank].T @ change.double() / roots.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    return up.float(), down.float()
