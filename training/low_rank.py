"""A change of weights as the product of two thin matrices, as LoRA files hold it.

A training by Adam changes a matrix in nearly all of its directions, but a projection of prompts is only asked along
those that prompts have. So what is kept is the best for prompts: of the change D and the covariance C of the tokens,
the directions of D C^(1/2) with the largest singular values. What is missed then, as a share of what D does to the
tokens, is the root of the sum of the squares of the others over that of all (Eckart and Young 1936).
"""

from __future__ import annotations

import torch
from torch import Tensor


def covariance(contexts: Tensor) -> Tensor:
    """The uncentred covariance (width, width) of the tokens of prompts (n, tokens, width), in float64, of each token's
    direction alone: a text encoder's start token may be longer than all the others together."""
    tokens = torch.nn.functional.normalize(contexts.double().flatten(0, 1), dim=-1)
    return tokens.T @ tokens / len(tokens)


def directions(change: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """The left singular vectors (out, k) and singular values (k), falling, of a change (out, in) for tokens of the
    covariance `spread` (in, in), in float64."""
    whole = change.double()
    values, vectors = torch.linalg.eigh(whole @ spread.to(whole) @ whole.T)
    return vectors.flip(1), values.flip(0).clamp(min=0).sqrt()


def rank_for(values: Tensor, error: float) -> int:
    """The least rank, at least 1, at which what is left out is at most `error` times the whole; of falling singular
    values."""
    left = values.square().flip(0).cumsum(0).flip(0)
    enough = left <= error**2 * left[0]
    return max(int(enough.int().argmax()) if bool(enough.any()) else len(values), 1)


def factors(change: Tensor, spread: Tensor, rank: int, error: float) -> tuple[Tensor, Tensor] | None:
    """`change` (out, in) as up (out, rank) times down (rank, in), both float32, for tokens of the covariance `spread`
    (in, in); `rank` 0 takes the least that misses no more than `error`, as a share of what the change does to them.
    None where two such matrices are no smaller than the change itself."""
    vectors, values = directions(change, spread)
    rank = min(rank or rank_for(values, error), len(values))
    if rank * sum(change.shape) >= change.numel():
        return None
    up = vectors[:, :rank]
    down = up.T @ change.double()
    # Of like size: half precision has no room for the small ones.
    roots = down.norm(dim=1).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return (up * roots).float(), (down / roots[:, None]).float()
