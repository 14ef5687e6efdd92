"""The dual branch as the generation is: under noise masks of every kind, in inpainting U-Nets, under CFG++."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.samplers
import node_helpers
import pytest
import torch
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from comfy_extras.nodes_model_advanced import RescaleCFG
from subject_patches.patches.engine.denoising import step_by_the_unconditional
from subject_patches.tests.shared.models import (
    auxiliary_prompt,
    difference,
    generator,
    integrated,
    known_prompt,
    latent_noise,
    prompt,
    randn,
    sample,
    small_model,
    through,
)
from torch import Tensor

SIZE = (6, 9)
SCENE = torch.randn(2, 4, *SIZE, generator=generator(50))
HARD = torch.zeros(1, 1, *SIZE)
HARD[..., 1:4, 2:7] = 1
GREY = torch.linspace(0, 1, SIZE[1]).expand(1, 1, *SIZE).clone()
EACH = torch.cat([HARD, 1 - HARD])
MASKS = {"hard": HARD, "grey": GREY, "one for each picture": EACH}


def watched(model: Any, seen: list[tuple[float, Tensor, Tensor | None]]) -> Any:
    """A clone that writes down the noise level, the latents and the extra channels of the auxiliary prompt's passes."""
    ((auxiliary, _),) = auxiliary_prompt()

    def note(apply: Callable[..., Tensor], x: Tensor, sigma: Tensor, **values: Any) -> Tensor:
        extra = values.get("c_concat")
        for row, context in enumerate(values["c_crossattn"]):
            if torch.equal(context[None], auxiliary):
                seen.append((float(sigma[0]), x[row].clone(), None if extra is None else extra[row].clone()))
        return apply(x, sigma, **values)

    return through(model, note)


def branch_and_generation(
    model: Any, shown: Callable[[Any], Any] = lambda prompt: prompt, **run: Any
) -> tuple[list[Any], list[Any]]:
    """What the branch's passes were, and those of a generation of its prompt with the same noise, guided as it is."""
    mine: list[Any] = []
    theirs: list[Any] = []
    values = {"noise": "the concept's", "guidance": "own"}
    run = {"size": SIZE, "steps": 4, "batch": 2, "negative": shown(prompt(2)), **run}
    # Made before either runs: a loaded model's own call is the watched one.
    branched, alone = integrated(watched(model, mine), **values), watched(model, theirs)
    sample(branched, positive=shown(known_prompt()), **run)
    sample(alone, positive=shown(auxiliary_prompt()), **run)
    return mine, theirs


def check(mine: list[Any], theirs: list[Any]) -> None:
    """The branch's passes are the generation's, but for the last level, which is outside of its window."""
    assert len(mine) >= 6
    for (level, x, extra), (other, right, more) in zip(mine, theirs, strict=False):
        assert level == other
        torch.testing.assert_close(x, right, rtol=1e-4, atol=1e-4)
        assert (extra is None) == (more is None)
        if extra is not None:
            torch.testing.assert_close(extra, more)


# Noise masks


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("differential", [False, True], ids=["", "differential diffusion"])
@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_the_branch_is_blended_as_the_generation_is(mask: str, differential: bool, denoise: float, model: Any) -> None:
    patched = DifferentialDiffusion.execute(model).args[0] if differential else model
    check(*branch_and_generation(patched, latent=SCENE, mask=MASKS[mask], denoise=denoise))


def test_what_the_mask_keeps_has_the_branchs_own_noise(model: Any) -> None:
    """Under shared guidance and with a noise of its own too: the kept region is the picture with that noise, of one
    sigma at every level."""
    seen: list[tuple[float, Tensor, Tensor | None]] = []
    sample(integrated(watched(model, seen)), size=SIZE, steps=5, latent=SCENE[:1], mask=HARD, cfg=7.0)
    kept = HARD[0, 0] == 0
    clean = model.model.process_latent_in(SCENE[:1])[0]
    noises = [(x - clean)[:, kept] / sigma for sigma, x, _ in seen[1:]]
    assert len(noises) >= 3
    for noise in noises:
        torch.testing.assert_close(noise, noises[0], rtol=1e-3, atol=1e-3)
        assert 0.8 < float(noise.std()) < 1.2
    assert difference(noises[0], latent_noise(1, SIZE, 5)[0][:, kept]) > 0.1


def test_a_mask_of_ones_is_none(model: Any) -> None:
    run = {"size": SIZE, "latent": SCENE[:1], "steps": 3}
    masked = sample(integrated(model), mask=torch.ones(1, 1, *SIZE), **run)
    torch.testing.assert_close(masked, sample(integrated(model), **run), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conditioned", [True, False], ids=["with its conditioning", "with a mask only"])
@pytest.mark.parametrize("masked", [True, False], ids=["noise mask", "no noise mask"])
def test_an_inpainting_model_is_shown_the_generations_picture(conditioned: bool, masked: bool) -> None:
    def shown(given: Any) -> Any:
        values = {"concat_latent_image": SCENE * (1 - HARD), "concat_mask": HARD}
        return node_helpers.conditioning_set_values(given, values) if conditioned else given

    run = {"latent": SCENE, "mask": HARD} if masked else {"latent": SCENE}
    mine, theirs = branch_and_generation(small_model(in_channels=9), shown, **run)
    check(mine, theirs)
    assert all(extra is not None for *_, extra in mine)


# CFG++


@pytest.mark.parametrize("cfg", [0.6, 1.0, 3.0])
def test_the_branch_steps_as_cfg_plus_plus_does(cfg: float, model: Any) -> None:
    check(*branch_and_generation(model, sampler="euler_cfg_pp", cfg=cfg))
    check(*branch_and_generation(model, sampler="euler", cfg=cfg))


@pytest.mark.parametrize("guidance", ["rescaled", "looked at after"])
def test_the_branch_is_guided_by_the_generations_own_rule(guidance: str, model: Any) -> None:
    """A node that puts another rule in the place of the sum; and one that looks at its result, which is no CFG++."""
    if guidance == "rescaled":
        (ruled,) = RescaleCFG().patch(model, 0.7)
    else:
        ruled = model.clone()
        ruled.set_model_sampler_post_cfg_function(lambda given: given["denoised"])
    check(*branch_and_generation(ruled, cfg=7.0))
    check(*branch_and_generation(ruled, cfg=0.8, sampler="euler_cfg_pp"))


@pytest.mark.parametrize("sampler", [name for name in comfy.samplers.KSampler.SAMPLERS if "cfg_pp" in name])
def test_a_branch_of_the_generations_own_prompt_goes_its_way(sampler: str, model: Any) -> None:
    """Between the first two levels, where every sampler takes the step by CFG++ of first order (an ancestral one adds
    noise to it): with the generation's noise and prompt the branch's latents are the generation's."""
    mine, theirs = branch_and_generation(model, sampler=sampler, cfg=0.8, steps=6)
    levels = sorted({level for level, *_ in mine}, reverse=True)
    second = [x for level, x, _ in mine if level == levels[1]]
    right = [x for level, x, _ in theirs if level == levels[1]]
    assert second[0].isfinite().all()
    if "ancestral" not in sampler:
        torch.testing.assert_close(second[0], right[0], rtol=1e-4, atol=1e-4)


def test_the_step_by_cfg_plus_plus_is_exact_for_flows_too() -> None:
    """Noise that a flow's latents have, at another level, over another picture."""

    def flow(sigma: float, noise: Tensor, latents: Tensor) -> Tensor:
        return sigma * noise + (1 - sigma) * latents

    noise, picture, guided = (randn(1, 4, 3, 3, seed=seed) for seed in (1, 2, 3))
    step = step_by_the_unconditional(guided, flow(0.7, noise, picture), picture, 0.7, 0.4, flow)
    torch.testing.assert_close(step, flow(0.4, noise, guided))
