"""Runs by the Step-Blended Guider, and by each of its models alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from subject_patches.nodes.step_blended_guider import StepBlendedGuiderNode
from subject_patches.tests.shared.models import (
    generator,
    latent_noise,
    levels,
    prompt,
)
from torch import Tensor

ROUNDING = 2e-5
STEPS = 4
SEED = 5


def concept_of(model: Any, seed: int = 3) -> Any:
    """The model with a LoRA-like patch on some of its weights: a clone that shares the rest."""
    patched = model.clone()
    weights = {name: value for name, value in model.model.state_dict().items() if name.endswith("attn2.to_v.weight")}
    change = {name: (0.5 * torch.randn(value.shape, generator=generator(seed)),) for name, value in weights.items()}
    assert patched.add_patches(change)
    return patched


@dataclass
class Run:
    """One sampling run: its picture, and which model ran at which noise level, call by call."""

    picture: Tensor
    calls: list[tuple[str, float]] = field(default_factory=list)


def watched(model: Any, name: str, calls: list[tuple[str, float]]) -> Any:
    """A clone that writes down its name and the noise level of each call."""

    def keep(executor: Any, x: Tensor, timestep: Tensor, *args: Any) -> Tensor:
        calls.append((name, float(timestep[0])))
        return executor(x, timestep, *args)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", keep)
    return clone


def guider_of(first: Any, second: Any, steps: int, **values: Any) -> Any:
    """The guider of two models, the first one for so many steps; `values` are the node's inputs."""
    given = {"positive": prompt(1), "personalised_positive": prompt(11), "negative": prompt(2)}
    given |= {"cfg": 3.0, "personalised_cfg": 2.0, **values}
    return StepBlendedGuiderNode.execute(model=first, personalised_model=second, first_steps=steps, **given).args[0]


def sample_with(guider: Any, sampler: Any = "euler", sigmas: Tensor | None = None, **values: Any) -> Tensor:
    """What a guider samples; `values` are its noise, latent_image, mask and callback."""
    sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    noise = latent_noise(1, (8, 8), SEED)
    given = {"latent_image": torch.zeros_like(noise), "noise": noise, **values}
    torch.manual_seed(SEED)
    sigmas = levels(guider.model_patcher, STEPS) if sigmas is None else sigmas
    with torch.inference_mode():
        return guider.sample(
            given["noise"], given["latent_image"], sampler, sigmas,
            denoise_mask=given.get("mask"), callback=given.get("callback"), disable_pbar=True, seed=SEED,
        )  # fmt: skip


def blended(model: Any, concept: Any, steps: int, sampler: Any = "euler", **values: Any) -> Run:
    """A run whose first steps are the model's, the rest the concept's."""
    calls: list[tuple[str, float]] = []
    guider = guider_of(watched(model, "first", calls), watched(concept, "second", calls), steps)
    return Run(sample_with(guider, sampler, **values), calls)


def alone(model: Any, positive: Any, cfg: float, sampler: Any = "euler", **values: Any) -> Tensor:
    """A whole run by one model, as the host's guider does it."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, prompt(2))
    guider.set_cfg(cfg)
    return sample_with(guider, sampler, **values)
