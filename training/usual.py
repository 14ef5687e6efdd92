"""What a training takes where its inputs are 0: what papers and authors say, and for the toy what it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..toy.family import ToyDiffusion


@dataclass(frozen=True)
class Usual:
    """Steps, pictures a step, the side of a picture in pixels, and learning rates; `words` is that of an ICO concept's
    words."""

    steps: int
    batch: int
    side: int
    rate: float
    words: float = 0.0


def usual_concept(model: Any) -> Usual:
    """An ICO concept's. The rate of the projections is the authors' for one picture a step; the paper has 500 steps."""
    if _is_toy(model):
        return Usual(50, 2, usual_side(model), 5e-3, 3e-2)
    return Usual(500, 2, usual_side(model), 1e-5, 5e-4)


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
