"""Guiders and nodes of the host's that change what a run's prompts are guided or encoded by."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import comfy.latent_formats
import comfy.supported_models as known
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy.samplers import Sampler, calc_cond_batch
from comfy_extras.nodes_custom_sampler import CFGOverride, DualModelGuider
from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM
from hosting.random_models import model_of
from subject_patches.nodes.references import reference_streams
from subject_patches.patches.engine.conditionings import of_the_stream
from subject_patches.patches.engine.denoising import Denoising
from subject_patches.patches.families import family_of
from subject_patches.tests.shared.dit_models import dit_model
from subject_patches.tests.shared.mechanisms import MECHANISMS, Mechanism
from subject_patches.tests.shared.models import (
    POOLED,
    SMALL,
    difference,
    inputs_of,
    latent_noise,
    levels,
    prompt,
    randn,
    recycled,
    sample,
    small_model,
    subject,
)
from torch import Tensor

SWAP = next(each for each in MECHANISMS if each.name == "a swapped reference")
DUAL = next(each for each in MECHANISMS if each.name == "dual branch")
SMALL_XL = {**SMALL, "model_channels": 64, "use_linear_in_transformer": True, "num_classes": "sequential"}


def small_xl(refiner: bool = False, pooled: int = POOLED) -> Any:
    kind, numbers = (known.SDXLRefiner, 5) if refiner else (known.SDXL, 6)
    return model_of(kind, {**SMALL_XL, "adm_in_channels": pooled + numbers * 256})


@pytest.mark.parametrize(("cfg", "own"), [(1.0, 4.0), (4.0, 1.0)])
@pytest.mark.parametrize("mechanism", [SWAP, DUAL], ids=lambda each: each.name)
def test_a_cfg_of_some_steps_alone(mechanism: Mechanism, cfg: float, own: float, model: Any) -> None:
    """Before our node or behind it: the negative prompt is patched in the steps in which it runs."""

    def overridden(target: Any) -> Any:
        return CFGOverride.execute(target, own, 0.0, 0.5).args[0]

    run = {"cfg": cfg, "steps": 4}
    result = sample(overridden(mechanism.on(model)), **run)
    assert torch.equal(sample(mechanism.on(overridden(model)), **run), result)
    assert difference(result, sample(mechanism.on(model), **run)) > 0.003


def guided(guider: Any, steps: int = 1) -> Tensor:
    noise, sigmas = latent_noise(1, (8, 8), 5), levels(guider.model_patcher, steps)
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), OnePrediction(), sigmas, seed=0, disable_pbar=True)


class OnePrediction(Sampler):
    """What the guider predicts at the first level."""

    def sample(
        self, model: Any, sigmas: Tensor, given: dict[str, Any], callback: Any, noise: Tensor, *_: Any
    ) -> Tensor:
        return model(noise * sigmas[0], sigmas[:1], **given)


def test_another_model_for_the_negative_prompt_stays_as_it_is(model: Any) -> None:
    """The host runs it with the options of the other: features of one network are not for another's layers."""
    other, negative, positive = small_model(seed=3), prompt(2), prompt(1)
    patched = SWAP.on(model)

    def prediction(one: Any, two: Any, cfg: float) -> Tensor:
        return guided(DualModelGuider.execute(one, positive, cfg, two, negative).args[0])

    conditioned, by_itself = prediction(patched, other, 1.0), prediction(model, other, 1.0)
    both, plain = prediction(patched, other, 3.0), prediction(model, other, 3.0)
    assert difference(conditioned, by_itself) > 0.003
    # uncond = (guided - cfg cond) / (1 - cfg), of the run with our nodes and of the one without.
    torch.testing.assert_close((both - 3 * conditioned) / -2, (plain - 3 * by_itself) / -2, rtol=1e-4, atol=1e-4)


def test_a_pass_of_another_pack_before_the_run_has_begun(model: Any) -> None:
    """Nothing is known of its streams yet, so it is as it would be without nodes of ours."""

    def probing(executor: Any, x: Tensor, timestep: Tensor, options: dict[str, Any], seed: Any = None) -> Tensor:
        guider = executor.class_obj
        calc_cond_batch(guider.inner_model, [guider.conds["positive"]], x, timestep, options)
        return executor(x, timestep, options, seed)

    probed = recycled(model)
    probed.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", probing)
    assert torch.equal(sample(probed), sample(recycled(model)))


def test_prompts_with_pictures_of_unclip() -> None:
    """Encoded anew for a reference, with random numbers of its own."""
    model = small_xl(pooled=1280)
    seen = {
        "clip_vision_output": SimpleNamespace(image_embeds=randn(1, 1280, seed=4)),
        "strength": 1.0,
        "noise_augmentation": 0.3,
    }
    shown = prompt(1, unclip_conditioning=[seen])
    run = {"positive": shown, "negative": prompt(2, unclip_conditioning=[seen]), "cfg": 3.0}
    plain, result = sample(model, **run), sample(recycled(model), **run)
    assert result.isfinite().all()
    assert difference(result, plain) > 0.003
    assert torch.equal(sample(recycled(model), **run), result)


def test_the_refiner_is_told_of_a_negative_prompt() -> None:
    """Its aesthetic score is another: of the generation's picture, and of a reference of another size as well."""
    model = small_xl(refiner=True)
    with inputs_of(model) as seen:
        sample(SWAP.on(model), steps=1)
    told = {tuple(row.tolist()) for each in seen for row in each["y"][:, POOLED:]}
    assert len(told) == 4


def test_latents_of_a_format_that_another_node_put_there() -> None:
    """References are in the model's latent space as the run has it, whatever is loaded."""
    (model,) = ModelSamplingContinuousEDM().patch(small_xl(), "edm_playground_v2.5", 120.0, 0.002)
    who = subject()
    (stream,) = reference_streams(model, who, 0, None)
    wanted = comfy.latent_formats.SDXL_Playground_2_5().process_in(who.references[0].latents)
    torch.testing.assert_close(stream.clean, wanted)
    before = sample(recycled(model, (who,)))
    assert torch.equal(sample(recycled(model, (subject(),))), before)


def test_a_reference_of_nothing_but_noise() -> None:
    """The host's first share of a schedule is without bound; the model's highest level is meant."""
    (model,) = ModelSamplingContinuousEDM().patch(small_model(), "v_prediction", 120.0, 0.002)
    highest = float(model.get_model_object("model_sampling").timestep(torch.tensor(120.0)))
    with inputs_of(model) as seen:
        result = sample(recycled(model, noise_level="fixed", fixed_level=0.0))
    assert result.isfinite().all()
    lent = [each for each in seen if tuple(each["x"].shape[-2:]) == (6, 8)]
    assert lent
    assert all(math.isclose(float(each["timesteps"][0]), highest, rel_tol=1e-4) for each in lent)


def test_a_branch_has_the_generations_guidance() -> None:
    branch = Denoising(torch.zeros(1, 16, 4, 4), lambda sigma: torch.zeros(1, 16, 4, 4))
    told = of_the_stream(branch, {"cross_attn": 1}, True, [{"guidance": 30.0}], (4, 4))
    assert told["guidance"] == 30.0
    own = of_the_stream(branch, {"cross_attn": 1, "guidance": 2.0}, True, [{"guidance": 30.0}], (4, 4))
    assert own["guidance"] == 2.0
    # Its negative prompt, which is the generation's, has what that has.
    assert "guidance" not in of_the_stream(branch, {"cross_attn": 1}, False, [{"guidance": 30.0}], (4, 4))


@pytest.mark.parametrize(("channels", "shown"), [(16, False), (32, False), (96, True)])
def test_what_a_flux_is_shown_of_a_reference(channels: int, shown: bool) -> None:
    """FLUX Fill the picture itself, of which nothing is hidden; Canny and Depth take a map, which it is not."""
    model = dit_model("FLUX.1", in_channels=channels)
    family = family_of(model)
    told = family.shown(model.model, torch.ones(1, 16, 4, 4))
    assert ("concat_latent_image" in told) == shown
