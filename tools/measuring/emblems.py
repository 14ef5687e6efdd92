"""Emblems as subjects: one's reference picture, and how much the emblems of a picture are those of the subjects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Known:
    """An emblem with its SUBJECT and the judge's vector (96) of its reference picture."""

    emblem: Any
    subject: Any
    identity: Tensor


def known(given: Any, emblem: Any, rng: Any, phrase: str = "emblem", masked: bool = True, **settings: Any) -> Known:
    """An emblem drawn once more, alone on a plain ground, as a subject; the whole of the picture where it is not
    `masked`. `settings` are those of Subject Reference."""
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
        [picture], given.toy.vae, phrase, size=96, margin=0.15, mask=[mask] if masked else [], **settings
    )
    return Known(emblem, made.args[0], identity)


@dataclass(frozen=True)
class Likeness:
    """One subject in a picture: the cosine of its place with its own reference, whether the judge sees an emblem there,
    and whether the place looks more like another subject."""

    identity: float
    emblem: bool
    blended: bool


def at_boxes(
    judge: Any, image: Tensor, boxes: Sequence[Box], identities: Tensor, seen: Sequence[bool]
) -> list[Likeness]:
    """What is in each subject's box (x0, y0, x1, y1) of a picture (1, h, w, 3); `identities` (n, 96)."""
    import torch

    vectors = judge.identity(image.expand(len(boxes), -1, -1, -1), torch.tensor(boxes, dtype=torch.float32))
    alike = vectors @ identities.T
    own = alike.diagonal()
    others = alike.masked_fill(torch.eye(len(alike), dtype=torch.bool), -torch.inf).amax(1)
    return [Likeness(*each) for each in zip(own.tolist(), seen, (others > own).tolist(), strict=True)]


def matched(judge: Any, image: Tensor, reading: Any, identities: Tensor) -> list[Likeness]:
    """The same where no place is given: the emblems that the judge finds (or what else it finds best, or the whole
    picture, where there are too few) go to the subjects so that they are most alike in all."""
    import torch
    from scipy.optimize import linear_sum_assignment

    whole = (0.0, 0.0, float(image.shape[2]), float(image.shape[1]))
    found = sorted(reading.objects, key=lambda each: (each.shape != "emblem", -each.score))
    places = [(each.box, each.shape == "emblem") for each in found]
    places = (places + [(whole, False)] * len(identities))[: max(len(identities), sum(e for _, e in places))]
    boxes = torch.tensor([box for box, _ in places], dtype=torch.float32)
    vectors = judge.identity(image.expand(len(boxes), -1, -1, -1), boxes)
    _, chosen = linear_sum_assignment(-(identities @ vectors.T).numpy())
    picked = [places[number] for number in chosen]
    return at_boxes(judge, image, [box for box, _ in picked], identities, [emblem for _, emblem in picked])
