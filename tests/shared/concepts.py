"""What trainings of concepts take, small, shared by the tests."""

from __future__ import annotations

from typing import Any

import torch
from hosting.random_models import generator
from subject_patches.nodes.train_concept import TrainConceptNode
from subject_patches.tests.shared.clips import small_clip
from subject_patches.tests.shared.models import CONTEXT, small_model
from subject_patches.tests.shared.small_vaes import small_vae
from subject_patches.training.concept_files import Concept
from subject_patches.training.concept_run import Settings, train_concept
from subject_patches.training.concept_words import SCHEMES
from subject_patches.training.regularisation import Regularisation
from subject_patches.training.state import StateFile
from torch import Tensor


def matching_clip(seed: int = 0) -> Any:
    """A CLIP whose contexts are as wide as the small model takes them."""
    return small_clip("SD 1.x", seed, hidden_size=CONTEXT)


def pictures(count: int = 3) -> Tensor:
    return torch.rand(count, 64, 64, 3, generator=generator(1))


def latents(count: int = 3, versions: int = 2) -> Tensor:
    return torch.randn(count, versions, 4, 8, 8, generator=generator(2)) * 3


def trained(
    steps: int = 3,
    state: StateFile | None = None,
    preset: str = "plain",
    others: Regularisation | None = None,
    **values: Any,
) -> Concept:
    """A concept trained from random latents."""
    rates = {"learning_rate": 1e-3, "word_learning_rate": 1e-2, "concept_learning_rate": 1e-2}
    settings = Settings("dog", SCHEMES[preset], steps, **rates, **values)
    return train_concept(small_model(), matching_clip(), latents(), settings, state, others)


def others(count: int = 2) -> Regularisation:
    drawn = torch.randn(count, 2, 4, 8, 8, generator=generator(6))
    return Regularisation(drawn, [f"a dog on {number}" for number in range(count)])


def made(model: Any, clip: Any, **values: Any) -> tuple[Any, ...]:
    """What Train ICO Concept gives for some pictures."""
    given = {"noun": "dog", "name": "my_dog", "preset": "for dual-branch", "steps": 2, "size": 64, "vae": small_vae()}
    rates = {"learning_rate": 1e-2, "word_learning_rate": 1e-2}
    return TrainConceptNode.trained([pictures()], model, clip, **{**given, **rates, **values}).args
