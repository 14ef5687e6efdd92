"""Self-recurrence: the authors' sampler, and the node in sampling runs of the host."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.k_diffusion.sampling import sample_euler
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from subject_patches.nodes.self_recurrence import SAMPLERS, SelfRecurrenceNode
from subject_patches.patches.mechanisms.self_recurrence import recur, row_noise
from subject_patches.patches.parts.process import Process
from subject_patches.tests.shared.golden_cases import Golden, cases_of
from subject_patches.tests.shared.models import difference, known_prompt, latent_noise, prompt
from torch import Tensor

TOLERANCE = 2e-5


CASES = cases_of("cones2", Golden, lambda each: "recurrence_noise" in each.tensors)


@pytest.mark.parametrize("golden", CASES, ids=lambda golden: golden.name)
def test_the_authors_sampler(golden: Golden) -> None:
    case, given = golden.case, golden.tensors
    sigmas, timesteps, seen = given["sigmas"], given["timesteps"].tolist(), []
    assert case["stub_unet"] == "0.6*x_scaled + 3*mean(ctx) + t/4000"
    assert case["lms_order"] == 1
    conditioned, unconditioned = given["cond_embeddings_mean_after_residuals"], given["uncond_embeddings_mean"]

    def denoised(x: Tensor, sigma: Tensor, time: float) -> Tensor:
        scaled = x / (sigma[0] ** 2 + 1).sqrt()
        one, other = (0.6 * scaled + 3 * mean + time / 4000 for mean in (conditioned, unconditioned))
        guided = other + case["cfg_scale"] * (one - other)
        if case["prediction_type"] == "v_prediction":
            return x / (sigma[0] ** 2 + 1) - guided * sigma[0] / (sigma[0] ** 2 + 1).sqrt()
        return x - sigma[0] * guided

    def step(x: Tensor, levels: Tensor, number: int, turn: int) -> Tensor:
        seen.append(sample_euler(lambda x, sigma: denoised(x, sigma, timesteps[number]), x, levels, disable=True))
        return seen[-1]

    guided = {float(sigma) for sigma in sigmas[: case["guidance_steps"]]}
    start = given["latents_unit_noise"] * given["init_noise_sigma"]
    recur(
        step,
        start,
        sigmas,
        lambda s: 2 if s in guided else 1,
        lambda x, n, turn: given["recurrence_noise"][n],
        Process(),
    )
    right = given["latents_after_each_scheduler_step"]
    assert len(seen) == case["n_scheduler_steps"]
    torch.testing.assert_close(torch.stack(seen), right, rtol=0, atol=TOLERANCE)


def test_noise_is_of_its_place_and_row_only() -> None:
    three = row_noise(torch.zeros(3, 4, 5, 5), 7, "back", 2, 1)
    assert torch.equal(three[:1], row_noise(torch.zeros(1, 4, 5, 5), 7, "back", 2, 1))
    others = [row_noise(three, *place) for place in ((8, "back", 2, 1), (7, "step", 2, 1), (7, "back", 1, 2))]
    assert all(difference(other, three) > 0.1 for other in (*others, three.roll(1, 0)))


@pytest.fixture(scope="module")
def flow(model: Any) -> Any:
    """The small model, taken for a flow with a shift."""
    return ModelSamplingSD3().patch(model, 3.0)[0]


def run(model: Any, sampler: Any, batch: int = 1, steps: int = 4, calls: list[float] | None = None) -> Tensor:
    """What the host's SamplerCustom node does."""
    if calls is not None:
        model = model.clone()
        model.set_model_sampler_pre_cfg_function(
            lambda args: calls.append(float(args["sigma"][0])) or args["conds_out"]
        )
    noise = latent_noise(batch, (7, 10), 5)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    rest = (known_prompt(), prompt(2), torch.zeros_like(noise))
    with torch.inference_mode():
        return comfy.sample.sample_custom(model, noise, 3.0, sampler, sigmas, *rest, disable_pbar=True, seed=5)


def wrapped(name: str = "euler", turns: int = 2, window: tuple[float, float] = (0.0, 1.0), seed: int = 0) -> Any:
    return SelfRecurrenceNode.execute(comfy.samplers.sampler_object(name), turns, *window, seed).args[0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_it_takes(name: str, model: Any) -> None:
    plain: list[float] = []
    without, calls = run(model, comfy.samplers.sampler_object(name), calls=plain), []
    result = run(model, wrapped(name), calls=calls)
    assert result.isfinite().all()
    assert difference(result, without) > 0.01
    assert sorted(calls) == sorted(plain * 2)
    assert torch.equal(run(model, wrapped(name)), result)
    assert difference(run(model, wrapped(name), batch=2)[:1], result) < TOLERANCE


@pytest.mark.parametrize("name", ["euler", "euler_ancestral"])
def test_flows(name: str, flow: Any) -> None:
    calls: list[float] = []
    without, result = run(flow, comfy.samplers.sampler_object(name)), run(flow, wrapped(name), calls=calls)
    assert result.isfinite().all()
    assert difference(result, without) > 0.01
    # The first call is at pure noise, to which every turn goes back.
    assert calls.count(1.0) == 2


def test_once_is_the_sampler_itself(model: Any) -> None:
    without = run(model, comfy.samplers.sampler_object("euler"))
    for sampler in (wrapped(turns=1), wrapped(window=(0.4, 0.4))):
        assert torch.equal(run(model, sampler), without)


def test_steps_one_by_one_are_the_sampler_bit_for_bit() -> None:
    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return 0.3 * x - sigma[0]

    def step(x: Tensor, levels: Tensor, number: int, turn: int) -> Tensor:
        return sample_euler(model, x, levels, disable=True)

    x, sigmas = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([9.0, 4.0, 1.0, 0.0])
    stepwise = recur(step, x, sigmas, lambda sigma: 1, lambda *_: torch.full((), float("nan")), Process())
    assert torch.equal(stepwise, sample_euler(model, x, sigmas, disable=True))


def test_seeds_and_windows(model: Any) -> None:
    assert difference(run(model, wrapped(seed=1)), run(model, wrapped())) > 0.01
    calls: list[float] = []
    run(model, wrapped(turns=3, window=(0.0, 0.5)), steps=6, calls=calls)
    middle = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    assert {sigma: calls.count(sigma) for sigma in calls} == {s: 3 if s >= middle else 1 for s in calls}
    assert len(set(map(calls.count, calls))) == 2


@pytest.mark.parametrize("name", ["dpmpp_2m", "lms", "dpm_adaptive", "uni_pc"])
def test_samplers_that_remember_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be done one step at a time; choose one of euler"):
        wrapped(name)


def test_what_it_refuses_besides() -> None:
    with pytest.raises(ValueError, match="The turns are 0"):
        wrapped(turns=0)
    churning = comfy.samplers.ksampler("euler", {"s_churn": 1.0})
    with pytest.raises(ValueError, match="s_churn"):
        SelfRecurrenceNode.execute(churning, 2, 0.0, 1.0, 0)
