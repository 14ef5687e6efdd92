"""Which part of the picture the latents of a call of the model are: other packs call it on tiles, the host on windows.

Nothing in a call says so, and each pack cuts in its own way, so the latents themselves are found in those that the
sampler gave. They are full of noise: one pixel of four channels is hardly ever the same twice, and all of a part never.
Pure tensor code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain, groupby, pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

# The rows and the columns of a picture that a part shows, in its order: a rolled picture begins in the middle.
Lines = tuple[tuple[int, ...], tuple[int, ...]]


class Spot(NamedTuple):
    """Where the latents of one row of a batch are: the number of the picture, and its lines."""

    picture: int
    lines: Lines


class Run(NamedTuple):
    """Rows of a batch that follow each other, are of one prompt (by its number) and show one part of some pictures."""

    rows: slice
    prompt: int
    pictures: tuple[int, ...]
    lines: Lines


def spots_of(rows: Tensor, whole: Tensor) -> list[Spot] | None:
    """Where each of the rows (n, ..., h, w) lies in the whole (pictures, ..., height, width); None if one does not."""
    rows, whole = rows.flatten(1, -3), whole.flatten(1, -3)
    if rows.shape[1] != whole.shape[1] or rows.dtype != whole.dtype:
        return None
    found: list[Spot] = []
    for row in rows:
        known = dict.fromkeys(spot.lines for spot in found)
        places = product(known, range(len(whole)))
        again = (Spot(n, lines) for lines, n in places if torch.equal(cut(whole[n], lines), row))
        new = (Spot(n, lines) for n, each in enumerate(whole) if (lines := _lines(row, each)) is not None)
        spot = next(chain(again, new), None)
        if spot is None:
            return None
        found.append(spot)
    return found


def _lines(row: Tensor, picture: Tensor) -> Lines | None:
    """Where a part (channels, h, w) lies in a picture (channels, height, width)."""
    hits = (picture == row[:, :1, :1]).all(0).nonzero()
    for y, x in hits[:4].tolist():
        down = (row[:, :, :1] == picture[:, None, :, x]).all(0)
        across = (row[:, 0, :, None] == picture[:, y, None, :]).all(0)
        if not (bool(down.any(1).all()) and bool(across.any(1).all())):
            continue
        lines = (tuple(down.int().argmax(1).tolist()), tuple(across.int().argmax(1).tolist()))
        if torch.equal(cut(picture, lines), row):
            return lines
    return None


def cut(picture: Tensor, lines: Lines) -> Tensor:
    """The part of a picture (..., height, width) that shows some of its lines: (..., h, w)."""
    ys, xs = lines
    if _follow(ys) and _follow(xs):
        return picture[..., ys[0] : ys[0] + len(ys), xs[0] : xs[0] + len(xs)]
    down, across = (torch.tensor(each, device=picture.device) for each in lines)
    return picture.index_select(-2, down).index_select(-1, across)


def area_of(lines: Lines) -> tuple[int, int, int, int] | None:
    """Lines as the host writes an area, (height, width, y, x); None where they do not follow each other."""
    ys, xs = lines
    return (len(ys), len(xs), ys[0], xs[0]) if _follow(ys) and _follow(xs) else None


def _follow(numbers: Sequence[int]) -> bool:
    return all(later == earlier + 1 for earlier, later in pairwise(numbers))


def runs_of(spots: Sequence[Spot], prompts: int) -> list[Run] | None:
    """The rows of a batch as runs, where each part of each picture is there once for each of the prompts, in their
    order, whatever comes first in the batch: parts or prompts. None where that is not so."""
    if set(Counter(spots).values()) != {prompts}:
        return None
    seen: Counter[Spot] = Counter()
    numbered = []
    for row, spot in enumerate(spots):
        numbered.append((seen[spot], spot.lines, row, spot.picture))
        seen[spot] += 1
    runs = []
    for (prompt, lines), group in groupby(numbered, lambda each: each[:2]):
        rows = list(group)
        runs.append(Run(slice(rows[0][2], rows[-1][2] + 1), prompt, tuple(each[3] for each in rows), lines))
    return runs
