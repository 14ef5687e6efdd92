"""Emblems as subjects: one's reference picture, and how much the emblems of a picture are those of the subjects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Box = tuple[float, float, float, float]
NOUN = "emblem"


@dataclass(frozen=True)
class Known:
    """An emblem with its SUBJECT and the judge's vector (96) of its reference picture."""

    emblem: Any
    subject: Any
    identity: Tensor


def known(
    given: Any, emblem: Any, rng: Any, phrase: str = "emblem", masked: bool = True, size: int = 96, **settings: Any
) -> Known:
    """An emblem drawn once more, alone on a plain ground, as a subject; the whole of the picture where it is not
    `masked`. `size` and `settings` are those of Subject Reference."""
    import torch
    from subject_patches.nodes.subject import SubjectNode
    from subject_patches.toy.drawing import draw
    from subject_patches.toy.scenes import Background, view

    plain = "gray" if emblem.plate_colour != "gray" else "white"
    reference = draw(view(emblem, rng, Background("plain", (plain,))))
    picture = torch.from_numpy(reference.image).float()[None] / 255
    identity = given.judge.identity(picture, torch.from_numpy(reference.boxes).float())[0]
    mask = torch.from_numpy(reference.masks[:1]).float()
    made = SubjectNode.made(
        [picture], given.toy.vae, phrase, size=size, margin=0.15, mask=[mask] if masked else [], **settings
    )
    return Known(emblem, made.args[0], identity)


@dataclass(frozen=True)
class Likeness:
    """One subject in a picture: the cosine of its place with its own reference, whether the judge sees an emblem there,
    and whether the place looks more like another subject."""

    identity: float
    emblem: bool
    blended: bool


def first_box(objects: Sequence[Any]) -> Box:
    """The first object's box, or the whole picture's."""
    return objects[0].box if objects else (0.0, 0.0, 128.0, 128.0)


def places(readings: Sequence[Any]) -> tuple[list[Box], list[bool]]:
    """Of each picture the box of its emblem, and whether the judge sees one: where it sees none, what it sees best
    stands in its place, or the whole picture."""
    emblems = [[found for found in reading.objects if found.shape == NOUN] for reading in readings]
    boxes = [first_box(some or reading.objects) for some, reading in zip(emblems, readings, strict=True)]
    return boxes, [bool(some) for some in emblems]


def place_masks(judge: Any, images: Tensor) -> Tensor:
    """Masks (n, 128, 128) of the boxes of `places`: in a segmenter's place."""
    import torch

    masks = torch.zeros(images.shape[:3])
    for mask, box in zip(masks, places(judge.findings(images))[0], strict=True):
        x0, y0, x1, y1 = (round(side) for side in box)
        mask[max(y0, 0) : max(y1, 1), max(x0, 0) : max(x1, 1)] = 1
    return masks


def alike(judge: Any, images: Tensor, boxes: Sequence[Sequence[float]], identities: Tensor) -> Tensor:
    """(boxes, identities): the cosines of what is in each box with each identity (n, 96); a box for each of the
    pictures, or all of them in one picture."""
    import torch

    pictures = images.expand(len(boxes), -1, -1, -1)
    return judge.identity(pictures, torch.tensor(boxes, dtype=torch.float32)) @ identities.T


def most_alike(judge: Any, image: Tensor, found: Sequence[Any], identity: Tensor) -> float:
    """The cosine of the most alike of the objects found in a picture (1, 128, 128, 3) with an identity (96); 0 without
    any, because that of anything else means nothing."""
    return float(alike(judge, image, [each.box for each in found], identity[None]).max()) if found else 0.0


def at_boxes(
    judge: Any, image: Tensor, boxes: Sequence[Box], identities: Tensor, seen: Sequence[bool]
) -> list[Likeness]:
    """What is in each subject's box (x0, y0, x1, y1) of a picture (1, h, w, 3); `identities` (n, 96)."""
    import torch

    each_with_each = alike(judge, image, boxes, identities)
    own = each_with_each.diagonal()
    others = each_with_each.masked_fill(torch.eye(len(boxes), dtype=torch.bool), -torch.inf).amax(1)
    return [Likeness(*each) for each in zip(own.tolist(), seen, (others > own).tolist(), strict=True)]


def matched(judge: Any, image: Tensor, reading: Any, identities: Tensor) -> list[Likeness]:
    """The same where no place is given: the emblems that the judge finds (or what else it finds best, or the whole
    picture, where there are too few) go to the subjects so that they are most alike in all."""
    from scipy.optimize import linear_sum_assignment

    found = sorted(reading.objects, key=lambda each: (each.shape != NOUN, -each.score))
    seen = [(each.box, each.shape == NOUN) for each in found]
    seen = (seen + [(first_box(()), False)] * len(identities))[: max(len(identities), sum(e for _, e in seen))]
    likeness = alike(judge, image, [box for box, _ in seen], identities)
    _, chosen = linear_sum_assignment(-likeness.T.numpy())
    picked = [seen[number] for number in chosen]
    return at_boxes(judge, image, [box for box, _ in picked], identities, [emblem for _, emblem in picked])
