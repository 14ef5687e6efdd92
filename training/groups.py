"""Samples of several subjects, from which a router learns: those of `samples.py`, with more subjects in them.

The first subject's files are called as there, `KEY.mask.png`, `KEY.subject.png` and maybe `KEY.subject_mask.png`; those
of the second `KEY.mask2.png`, `KEY.subject2.png` and `KEY.subject_mask2.png`, and so on up to the fourth. So a sample
of one subject is one of these, too, and of these a training of one subject reads the first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .samples import Raw, around, caption_of, fitted, opened, subject_of

MOST = 4
# The darkest that a subject's mask may be where it is brightest: less is next to nothing.
SEEN = 0.1
_NUMBERED = re.compile(r"(mask|subject|subject_mask)(\d*)")


@dataclass(frozen=True)
class Group:
    """One of them: a `picture` (size, size, 3), in which n subjects are where their `masks` (n, size, size) say; of
    each a picture of its own in `subjects` (n, size, size, 3), and where in that it is in `subject_masks` (n, size,
    size); of 0 to 1. And the `caption` of the picture."""

    picture: Tensor
    masks: Tensor
    subjects: Tensor
    subject_masks: Tensor
    caption: str


def decoded_group(raw: Raw, size: int, key: str = "a sample") -> Group:
    """The sample in its files. Of the picture it has the square in which the most of its subjects is; those that are
    outside it are left out.

    Raises ValueError, calling it `key`, where a file is missing or no picture, or where a subject is nowhere."""
    numbers = _numbers(raw, key)
    picture = opened(raw["picture"], "RGB", key)
    masks = torch.cat([fitted(opened(raw[f"mask{each}"], "L", key), picture.shape[-2:]) for each in numbers])
    for number, mask in zip(numbers, masks, strict=True):
        if float(mask.max()) <= 0.5:
            raise ValueError(f"{key} has a mask{number} that is nowhere white; paint its subject white, or drop it.")
    scene = around(picture, masks, size)
    inside = scene[3:].amax((1, 2)) > SEEN
    if not inside.any():
        raise ValueError(f"{key} has no subject that is to be seen at {size} pixels; take larger ones, or drop it.")
    shown = torch.stack([subject_of(raw, number, size, key) for number in numbers])
    for number, mask in zip(numbers, shown[:, 3], strict=True):
        if float(mask.max()) <= 0.5:
            raise ValueError(f"{key} has a subject{number} that is cut out to nothing; mend its mask or its opacity.")
    shown = shown[inside].movedim(1, -1)
    return Group(scene[:3].movedim(0, -1), scene[3:][inside], shown[..., :3], shown[..., 3], caption_of(raw))


def _numbers(raw: Raw, key: str) -> list[str]:
    """What stands behind the names of each subject's files: nothing, 2, 3, 4."""
    for name in ("picture", "txt"):
        if name not in raw:
            raise ValueError(f"{key} has no {name}; each needs picture, txt, mask, subject (see docs/TRAINING.md).")
    named = (_NUMBERED.fullmatch(name) for name in raw)
    found = {"", *(match[2] for match in named if match)}
    known = ["", *(str(number) for number in range(2, MOST + 1))]
    if unknown := sorted(found - set(known)):
        raise ValueError(
            f"{key} has files of a subject '{unknown[0]}'; a sample has up to {MOST}: subject, subject2 and so on."
        )
    numbers = [number for number in known if number in found]
    for name in (f"{part}{number}" for number in numbers for part in ("mask", "subject")):
        if name not in raw:
            raise ValueError(f"{key} has no {name}; a subject needs its mask and its picture (see docs/TRAINING.md).")
    return numbers
