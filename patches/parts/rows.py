"""Which of several masks or pictures goes with which picture of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Latents that went through the model's scaling and back differ by their rounding.
_ROUNDING = 1e-3


def rows_in_turn(count: int, rows: int) -> list[int]:
    """The one of `count` things that each of a batch's rows takes, by the host's rule of repeating: all of them in
    turn, from the first again after the last."""
    return [row % count for row in range(rows)]


def in_turn(tensor: Tensor, rows: int) -> Tensor:
    """A tensor (count, ...) as (rows, ...), by `rows_in_turn`; without a copy where it need not be made."""
    if len(tensor) == rows:
        return tensor
    if len(tensor) == 1:
        return tensor.expand(rows, *tensor.shape[1:])
    return tensor[rows_in_turn(len(tensor), rows)]


def check_rows(what: str, count: int, rows: int) -> None:
    """Raises ValueError when there are more things than rows, of which some would silently be left out. `what` names
    them, as in "region masks"."""
    if count > rows:
        pictures = "picture is" if rows == 1 else "pictures are"
        raise ValueError(
            f"There are {count} {what} but {rows} {pictures} sampled; give one for all, or one for each picture of the "
            "batch. Where pictures were taken out of a batch, take the same ones out here."
        )


def matching_rows(known: Sequence[Tensor], latents: Tensor) -> list[int] | None:
    """For each row of `latents` (rows, channels, height, width) the number of the picture that it is, where it is one
    of several pictures' latents: `known` are some stages (pictures, channels, height, width) of them all. None unless
    every row is one."""
    found = []
    for row in latents:
        number = next((n for stage in known for n, each in enumerate(stage) if _same(each, row)), None)
        if number is None:
            return None
        found.append(number)
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    one, other = one.float(), other.to(one.device).float()
    scale = float(one.std()) if one.numel() > 1 else 0.0
    return bool(torch.allclose(one, other, rtol=0, atol=_ROUNDING * scale)) and bool(one.any())
