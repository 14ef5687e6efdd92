"""Runs of the host with AnyStory, on the small FLUX of the golden cases, with random subjects."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.samplers
import torch
from subject_patches.encoders.anystory import AnyStory
from subject_patches.patches.anystory.anystory_loras import Loras
from subject_patches.patches.anystory.anystory_references import clean_reference
from subject_patches.patches.anystory.anystory_run import AnyStorySettings
from subject_patches.patches.parts.cache import FeatureCache
from torch import Tensor

from .anystory_models import golden_anystory
from .models import latent_noise, randn

WHOLE = (0.0, 1.0)


def settings(
    count: int = 2,
    router: bool = True,
    strength: float = 1.0,
    seed: int = 0,
    anystory: AnyStory | None = None,
    **given: Any,
) -> AnyStorySettings:
    """Subjects of random tokens and references; the mask leaves a part of each out."""
    loras = Loras(anystory or golden_anystory(), strength, 1.0)
    form = loras.anystory.form
    tokens = randn(1, 9 * count, form.context, seed=seed + 1)
    routers = randn(1, 4 * count, form.context, seed=seed + 2) if router else None
    mask = torch.ones(1, 12)
    mask[:, :3] = 0
    references = tuple(
        clean_reference(randn(1, 4, 6, 8, seed=seed + 10 + number), mask, given.get("shift", 0.0), loras, _cache())
        for number in range(count)
    )
    names = tuple(f"subject {number + 1}" for number in range(count))
    made = AnyStorySettings(loras, names, tokens, routers, references, WHOLE, WHOLE)
    return replace(made, **given)


def _cache() -> FeatureCache:
    return FeatureCache(2**26)


def prompt(seed: int = 1, length: int = 7, **values: Any) -> list[list[Any]]:
    return [[randn(1, length, 32, seed=seed), {"pooled_output": randn(1, 24, seed=seed + 1), **values}]]


def sample(
    model: Any,
    *,
    batch: int = 1,
    size: tuple[int, int] = (10, 12),
    steps: int = 2,
    cfg: float = 1.0,
    sampler: str = "euler",
    scheduler: str = "simple",
    seed: int = 5,
    positive: Any = None,
    negative: Any = None,
    callback: Any = None,
    function: Any = None,
) -> Tensor:
    chosen = comfy.samplers.sampler_object(sampler) if function is None else comfy.samplers.KSAMPLER(function)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompt() if positive is None else positive, prompt(20) if negative is None else negative)
    guider.set_cfg(cfg)
    noise = latent_noise(batch, size, seed)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
    with torch.inference_mode():
        return guider.sample(
            noise, torch.zeros_like(noise), chosen, sigmas, disable_pbar=True, seed=seed, callback=callback
        )  # fmt: skip


def hooks_of(model: Any) -> int:
    return sum(len(module._forward_hooks) for module in model.model.modules())
