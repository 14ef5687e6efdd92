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

from .samples import Raw, caption_of, in_sight, scene_of, subject_of

MOST = 4
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
    """The sample in its files. Those that are outside the square of the picture are left out; see `scene_of` and
    `subject_of`, which raise ValueError where it is none."""
    numbers = _numbers(raw, key)
    picture, masks = scene_of(raw, numbers, size, key)
    inside = in_sight(masks)
    shown = torch.stack([subject_of(raw, number, size, key) for number in numbers])[inside].movedim(1, -1)
    return Group(picture.movedim(0, -1), masks[inside], shown[..., :3], shown[..., 3], caption_of(raw))


def _numbers(raw: Raw, key: str) -> list[str]:
    """What stands behind the names of each subject's files: nothing, 2, 3, 4. Raises ValueError, calling the sample
    `key`, where there is another."""
    named = (_NUMBERED.fullmatch(name) for name in raw)
    found = {"", *(match[2] for match in named if match)}
    known = ["", *(str(number) for number in range(2, MOST + 1))]
    if unknown := sorted(found - set(known)):
        raise ValueError(
            f"{key} has files of a subject '{unknown[0]}'; a sample has up to {MOST}: subject, subject2 and so on."
        )
    return [number for number in known if number in found]
