"""Runs of flow models: pictures inverted and retouched, models that take turns, steps done twice, and CFG 1."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from subject_patches.nodes.self_recurrence import SelfRecurrenceNode
from subject_patches.nodes.step_blended_guider import StepBlendedGuiderNode
from subject_patches.nodes.trajectory import InvertToTrajectoryNode
from subject_patches.patches.mechanisms.inversion import Inversion
from subject_patches.patches.parts.window import Levels, Window
from subject_patches.tests.shared.dit_models import dit_model
from subject_patches.tests.shared.mechanisms import MECHANISMS, Mechanism
from subject_patches.tests.shared.models import (
    difference,
    frames_of,
    known_prompt,
    latent_noise,
    prompt,
    sample,
    second_context,
    subject_for,
    swapped,
)
from torch import Tensor

SIZE = (8, 6)


@pytest.fixture(scope="module", params=["FLUX.1 schnell", "Z-Image", "Wan", "HiDream"])
def model(request: Any) -> Any:
    return dit_model(request.param)


def sigmas_of(model: Any, steps: int = 3) -> Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)


def prompts(model: Any) -> tuple[Any, Any]:
    return known_prompt(**second_context(model, 1)), prompt(2, **second_context(model, 2))


def run(model: Any, noise: Tensor, sampler: Any, cfg: float = 1.0) -> Tensor:
    """What the host's SamplerCustom does from an empty latent."""
    given = (*prompts(model), torch.zeros_like(noise))
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model, noise, cfg, sampler, sigmas_of(model), *given, disable_pbar=True, seed=0
        )


def inverted(model: Any, seed: int) -> tuple[Inversion, Any, str, Any]:
    channels = model.model.latent_format.latent_channels
    # As a VAE of pictures gives it, and as one of videos does.
    latent = latent_noise(1, SIZE, seed, channels, frames_of(model) if seed % 2 else ())
    given = {"conditioning": prompts(model)[0], "measure_replay": True}
    with torch.inference_mode():
        return InvertToTrajectoryNode.execute(model, {"samples": latent}, sigmas_of(model), **given).args


def test_windows_are_shares_of_the_steps_whatever_the_shift(model: Any) -> None:
    sampling = model.get_model_object("model_sampling")
    levels = Levels(tuple(sigmas_of(model, 10).tolist()), True, sampling.percent_to_sigma)
    for start, end, inside in ((0.0, 0.45, range(5)), (0.15, 0.65, range(2, 7)), (0.55, 1.0, range(6, 10))):
        found = [n for n, sigma in enumerate(levels.sigmas[:-1]) if levels.lie_in(Window(start, end), sigma)]
        assert found == list(inside)


def test_a_picture_is_inverted_and_retouched(model: Any) -> None:
    layout, _, _, noise = inverted(model, 21)
    reference, *_ = inverted(model, 22)
    assert layout.states.shape[1:] == reference.states.shape[1:]
    assert layout.states.ndim == 5 + len(frames_of(model))
    start = noise.generate_noise({"samples": layout.states[-1]})
    # A flow begins with the inverted picture's last state and nothing else.
    torch.testing.assert_close(start, layout.states[0])
    euler = comfy.samplers.sampler_object("euler")
    plain = run(model, start, euler)
    retouched = run(swapped(model, layout, reference, sites="usual"), start, euler)
    assert retouched.isfinite().all()
    assert difference(retouched, plain) > 1e-3
    upper = torch.zeros(1, 8, 8)
    upper[:, :4] = 1
    masked = run(swapped(model, layout, replace(reference, mask=upper), sites="usual"), start, euler)
    assert difference(masked, retouched) > 1e-5


def test_two_models_take_turns(model: Any) -> None:
    other, weights = model.clone(), model.model.state_dict()
    second = [name for name in weights if re.search(r"(blocks|layers)\.1\.", name)]
    assert other.add_patches({name: (0.1 * weights[name],) for name in second})
    noise = latent_noise(1, SIZE, 5, model.model.latent_format.latent_channels, frames_of(model))
    positive, negative = prompts(model)
    given = {"positive": positive, "personalised_positive": positive, "negative": negative}
    guider = StepBlendedGuiderNode.execute(
        model=model, personalised_model=other, first_steps=1, cfg=1.0, personalised_cfg=1.0, **given
    ).args[0]
    euler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        result = guider.sample(
            noise, torch.zeros_like(noise), euler, sigmas_of(model), seed=0, disable_pbar=True
        )  # fmt: skip
    assert result.isfinite().all()
    # Neither model's own run: the second one acts, and not from the beginning.
    assert difference(result, run(model, noise, euler)) > 1e-4
    assert difference(result, run(other, noise, euler)) > 1e-4
    # All of its steps by the second model.
    none = StepBlendedGuiderNode.execute(
        model=model, personalised_model=other, first_steps=0, cfg=1.0, personalised_cfg=1.0, **given
    ).args[0]
    with torch.inference_mode():
        whole = none.sample(noise, torch.zeros_like(noise), euler, sigmas_of(model), seed=0, disable_pbar=True)
    assert torch.equal(whole, run(other, noise, euler))


def test_a_step_done_twice_begins_at_the_same_level(model: Any) -> None:
    noise = latent_noise(1, SIZE, 5, model.model.latent_format.latent_channels, frames_of(model))
    seen: list[float] = []
    watched = model.clone()
    watched.set_model_sampler_pre_cfg_function(lambda args: seen.append(float(args["sigma"][0])) or args["conds_out"])
    twice = SelfRecurrenceNode.execute(comfy.samplers.sampler_object("euler"), 2, 0.0, 1.0, 0).args[0]
    assert run(watched, noise, twice).isfinite().all()
    assert seen == [level for level in sigmas_of(model)[:-1].tolist() for _ in range(2)]


@pytest.mark.parametrize(
    "mechanism",
    [
        m
        for m in MECHANISMS
        if m.name in ("recycled self-attention", "layout bias", "a swapped reference", "dual branch")
    ],
    ids=lambda m: m.name,
)
def test_distilled_models_without_a_negative_prompt(mechanism: Mechanism, model: Any) -> None:
    """At CFG 1 the host runs no negative chunk; what acts, acts on the prompt's."""
    given = {"size": SIZE, "cfg": 1.0, "steps": 1}
    plain = sample(model, **given)
    patched = mechanism.on(model, (subject_for(model),), size=SIZE)
    result = sample(patched, **given)
    assert result.isfinite().all()
    assert difference(result, plain) > 1e-3
    assert torch.equal(sample(mechanism.off(model, "strength 0"), **given), plain)
