"""Step-Blended Guider: both models are whole in its runs and given back, and bad input."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import DisableNoise, SamplerCustomAdvanced
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.families import attention_sites
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared.look import Look
from subject_patches.tests.shared.models import (
    CONTEXT,
    difference,
    generator,
    latent_noise,
    levels,
    prompt,
    recycled,
)
from subject_patches.tests.shared.step_blending import (
    ROUNDING,
    SEED,
    STEPS,
    alone,
    blended,
    concept_of,
    guider_of,
    sample_with,
)
from subject_patches.toy.sampling import Toy


@pytest.fixture(scope="module")
def concept(model: Any) -> Any:
    return concept_of(model)


def test_each_models_patches_act_in_its_steps(model: Any, concept: Any) -> None:
    sites = frozenset(site for site in attention_sites(model) if site.kind == "self")
    looks = [Look(sites, Window()), Look(sites, Window())]
    first, second = (add_edit(recycled(m), look) for m, look in zip((model, concept), looks, strict=True))
    run = blended(first, second, 2)
    sigmas = [level for _, level in run.calls]
    for look, own in zip(looks, (sigmas[:2], sigmas[2:]), strict=True):
        assert sorted({seen.sigma for seen in look.of("positive")}, reverse=True) == own
        assert all(bool(seen.call.extensions) == (seen.call.site.stage != "encoder") for seen in look.of("positive"))


def test_weights_are_shared_and_given_back(model: Any, concept: Any) -> None:
    before, personalised = alone(model, prompt(1), 3.0), alone(concept, prompt(11), 2.0)
    loaded: list[int] = []

    def count(*_: Any) -> None:
        mine = [m for m in comfy.model_management.current_loaded_models if m.model is not None]
        loaded.append(sum(m.model.model is model.model for m in mine))

    result = blended(model, concept, 3, callback=count).picture
    assert concept.model is model.model
    assert loaded == [1] * STEPS
    assert torch.equal(alone(model, prompt(1), 3.0), before)
    assert torch.equal(alone(concept, prompt(11), 2.0), personalised)
    assert torch.equal(blended(model, concept, 3).picture, result)


def test_a_guider_is_used_again(model: Any, concept: Any) -> None:
    guider = guider_of(model, concept, 2)
    first = sample_with(guider)
    kept = {name: value for name, value in vars(guider).items() if name not in ("model_options",)}

    def fail(step: int, *_: Any) -> None:
        if step == 3:
            raise RuntimeError("the preview broke")

    with pytest.raises(RuntimeError, match="the preview broke"):
        sample_with(guider, callback=fail)
    assert {name: vars(guider).get(name) for name in kept} == kept
    assert torch.equal(sample_with(guider), first)


def test_a_batch_is_its_singles(model: Any, concept: Any) -> None:
    guider, noise = guider_of(model, concept, 2), latent_noise(3, (7, 10), SEED)
    together = sample_with(guider, noise=noise, latent_image=torch.zeros_like(noise))
    for row in range(3):
        own = noise[row : row + 1]
        alone = sample_with(guider, noise=own, latent_image=torch.zeros_like(own))
        assert difference(together[row : row + 1], alone) < ROUNDING


def test_an_inpainting_mask(model: Any, concept: Any) -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    scene = torch.randn(1, 4, 8, 8, generator=generator(8))
    result = sample_with(guider_of(model, concept, 2), latent_image=scene, mask=mask)
    assert difference(result[..., :4], scene[..., :4]) < ROUNDING
    assert difference(result[..., 4:], scene[..., 4:]) > 0.1


def test_in_the_hosts_sampler_node(model: Any, concept: Any) -> None:
    latent, guider = {"samples": latent_noise(1, (8, 8), SEED)}, guider_of(model, concept, 2)
    (noise,) = DisableNoise.execute().args
    sampler, sigmas = comfy.samplers.sampler_object("euler"), levels(model, STEPS)
    with torch.inference_mode():
        output, _ = SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args
    silent = {"noise": torch.zeros_like(latent["samples"]), "latent_image": latent["samples"]}
    assert torch.equal(output["samples"], sample_with(guider, **silent))


def test_more_steps_than_there_are(model: Any, concept: Any) -> None:
    with pytest.raises(
        ValueError, match=r"first_steps of Step-Blended Guider are 5 but the sampler takes 4 steps; lower"
    ):
        blended(model, concept, STEPS + 1)


@pytest.mark.parametrize("values", [{"cfg": float("nan")}, {"personalised_cfg": 101.0}, {"cfg": -1.0}])
def test_scales_out_of_range(values: dict[str, float], model: Any) -> None:
    (name,) = values
    with pytest.raises(ValueError, match=rf"The {name} is .*; give a number from 0 to 100\."):
        guider_of(model, model, 2, **values)


def test_negative_steps(model: Any) -> None:
    with pytest.raises(ValueError, match=r"first_steps are -1; give a number from 0 to 10000"):
        guider_of(model, model, -1)


def test_models_that_do_not_go_together(model: Any) -> None:
    (flow,) = ModelSamplingSD3().patch(model, 3.0)
    with pytest.raises(ValueError, match="Only one of the two models is a flow model"):
        guider_of(model, flow, 2)
    with pytest.raises(
        ValueError, match=r"different latents \(SD15 and ToyLatents\); take a personalised model of the"
    ):
        guider_of(model, Toy.load().model, 2)


def test_prompts_of_another_width(model: Any) -> None:
    """Each model has its own; at CFG 1 nothing reads the negative one."""
    wide = prompt(1, width=2 * CONTEXT)
    for name in ("positive", "personalised_positive", "negative"):
        with pytest.raises(ValueError, match=f"The {name} is {2 * CONTEXT} wide, but this model takes prompts"):
            guider_of(model, model, 2, **{name: wide})
    assert guider_of(model, model, 2, negative=wide, cfg=1.0, personalised_cfg=1.0)
    wrapped = model.clone()
    wrapped.set_model_unet_function_wrapper(lambda apply, given: given["input"])
    assert guider_of(wrapped, wrapped, 2, positive=wide, personalised_positive=wide, negative=wide)
