"""Inversions by the pack's own node."""

from __future__ import annotations

from typing import Any

import torch
from subject_patches.nodes.trajectory import InvertToTrajectoryNode
from subject_patches.patches.mechanisms.inversion import Inversion
from torch import Tensor

from .models import levels, prompt


def inverted_with_noise(model: Any, latent: Tensor, sigmas: Tensor | None = None, **values: Any) -> Any:
    """All that Invert to Trajectory gives, in four steps of the normal schedule; `values` are its inputs."""
    sigmas = levels(model, 4) if sigmas is None else sigmas
    given = {"conditioning": prompt(1), **values}
    with torch.inference_mode():
        return InvertToTrajectoryNode.execute(model, {"samples": latent}, sigmas, **given).args


def invert(model: Any, latent: Tensor, sigmas: Tensor | None = None, **values: Any) -> tuple[Inversion, Any, str]:
    """Its path, its last latents and its report."""
    return inverted_with_noise(model, latent, sigmas, **values)[:3]
