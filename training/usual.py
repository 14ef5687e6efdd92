"""What a training takes where its inputs are 0: what papers and authors say, and for the toy what it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..toy.family import ToyDiffusion


@dataclass(frozen=True)
class Usual:
    """Steps, pictures a step, the side of a picture in pixels, and learning rates; `words` is that of an ICO prompt's
    words of the picture's own, `concept` that of the concept's."""

    steps: int
    batch: int
    side: int
    rate: float
    words: float = 0.0
    concept: float = 0.0


@dataclass(frozen=True)
class UsualWords:
    """As what an ICO prompt's words begin, the pictures' own as a template's and the concept's as rare ones; whether
    pictures are mirrored half the time, and whether the start token is held."""

    template: bool
    rare: bool
    mirrored: bool
    held: bool


def usual_concept(model: Any, batch: int = 0, rate: float = 0.0) -> Usual:
    """An ICO concept's, where `batch` pictures a step and the projections' `rate` may be given. By the authors' code:
    900 steps of two pictures (on each of their three GPUs); the projections and the concept's words learn at 1e-5 for
    each picture of a step, the pictures' own words at ten times that."""
    if _is_toy(model):
        return Usual(50, 2, usual_side(model), 5e-3, 3e-2, 3e-2)
    batch = batch or 2
    rate = rate or batch / 100_000
    return Usual(900, batch, usual_side(model), rate, 10 * rate, rate)


def usual_words(model: Any) -> UsualWords:
    """An ICO training's: the authors' code's, and the toy's own, whose vocabulary has neither rare words nor templates
    and whose emblems are other ones in the mirror."""
    return UsualWords(*[not _is_toy(model)] * 4)


def usual_residual(model: Any, alone: bool) -> Usual:
    """A residual token's: Cones 2's for its text encoder. That of a residual alone is ours."""
    if _is_toy(model):
        return Usual(40, 8, usual_side(model), 0.1) if alone else Usual(150, 4, usual_side(model), 1e-3)
    return Usual(500, 1, usual_side(model), 0.05) if alone else Usual(3000, 1, usual_side(model), 1e-6)


def usual_side(model: Any) -> int:
    """The side in pixels of the square pictures that a MODEL's family was trained on: 128 for the toy, 512 for SD 1.x,
    512 for SD 2.x that predicts noise and 768 for one that predicts v, 1024 for SDXL."""
    from comfy.model_sampling import V_PREDICTION
    from comfy.supported_models import SD20, SDXL

    description = model.model.model_config
    if _is_toy(model):
        return 128
    if isinstance(description, SDXL):
        return 1024
    predicts_v = isinstance(model.get_model_object("model_sampling"), V_PREDICTION)
    return 768 if isinstance(description, SD20) and predicts_v else 512


def _is_toy(model: Any) -> bool:
    return isinstance(model.model.model_config, ToyDiffusion)
