"""Step-Blended Guider: exactly the first steps are the first model's, with every sampler of the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import DisableNoise, SamplerCustomAdvanced
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from subject_patches.nodes.self_recurrence import SelfRecurrenceNode
from subject_patches.nodes.step_blended_guider import StepBlendedGuiderNode
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.families import attention_sites
from subject_patches.patches.mechanisms.step_plan import Call, StepPlan, Told, step_at, steps_of_calls
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared.look import Look
from subject_patches.tests.shared.models import (
    difference,
    generator,
    latent_noise,
    prompt,
    recycled,
    small_model,
)
from subject_patches.toy.sampling import Toy
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
    def keep(executor: Any, x: Tensor, timestep: Tensor, *args: Any) -> Tensor:
        calls.append((name, float(timestep[0])))
        return executor(x, timestep, *args)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", keep)
    return clone


def sigmas_of(model: Any, steps: int = STEPS, scheduler: str = "normal") -> Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def guider_of(first: Any, second: Any, steps: int, **values: Any) -> Any:
    given = {"positive": prompt(1), "personalised_positive": prompt(11), "negative": prompt(2)}
    given |= {"cfg": 3.0, "personalised_cfg": 2.0, **values}
    return StepBlendedGuiderNode.execute(model=first, personalised_model=second, first_steps=steps, **given).args[0]


def sample_with(guider: Any, sampler: Any = "euler", sigmas: Tensor | None = None, **values: Any) -> Tensor:
    sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    noise = latent_noise(1, (8, 8), SEED)
    given = {"latent_image": torch.zeros_like(noise), "noise": noise, **values}
    torch.manual_seed(SEED)
    sigmas = sigmas_of(guider.model_patcher) if sigmas is None else sigmas
    with torch.inference_mode():
        return guider.sample(
            given["noise"], given["latent_image"], sampler, sigmas,
            denoise_mask=given.get("mask"), callback=given.get("callback"), disable_pbar=True, seed=SEED,
        )  # fmt: skip


def blended(model: Any, concept: Any, steps: int, sampler: Any = "euler", **values: Any) -> Run:
    calls: list[tuple[str, float]] = []
    guider = guider_of(watched(model, "first", calls), watched(concept, "second", calls), steps)
    return Run(sample_with(guider, sampler, **values), calls)


def alone(model: Any, positive: Any, cfg: float, sampler: Any = "euler", **values: Any) -> Tensor:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, prompt(2))
    guider.set_cfg(cfg)
    return sample_with(guider, sampler, **values)


@pytest.fixture(scope="module")
def concept(model: Any) -> Any:
    return concept_of(model)


# Exactly so many steps


def steps_seen(sampler: Any, model: Any) -> list[int]:
    """The step of each call in a real run, found when it is over: a step begins with the call before it is told of."""
    events: list[int | None] = []
    guider = guider_of(watched(model, "", _Appending(events)), model, STEPS)
    sample_with(guider, sampler, callback=lambda step, *_: events.append(step))
    owners: list[int] = []
    seen: set[int] = set()
    for event in events:
        if event is None:
            owners.append(len(seen) - 1)
        elif event not in seen:
            seen.add(event)
            owners[-1] = event
    assert seen == set(range(STEPS))
    return owners


class _Appending(list):
    """A list of calls that puts None in another one for each."""

    def __init__(self, events: list[int | None]) -> None:
        super().__init__()
        self.events = events

    def append(self, _: Any) -> None:
        self.events.append(None)


OWN_STEPS = {"dpm_fast", "dpm_adaptive"}
SAMPLERS = [name for name in comfy.samplers.SAMPLER_NAMES if name not in OWN_STEPS]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_with_every_sampler(sampler: str, model: Any, concept: Any) -> None:
    owners = steps_seen(sampler, model)
    run = blended(model, concept, 2, sampler)
    assert [name for name, _ in run.calls] == ["first" if owner < 2 else "second" for owner in owners]
    assert run.picture.isfinite().all()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("sampler", "calls"),
    [
        ("euler", [0, 1, 2, 3]),
        ("dpmpp_2m", [0, 1, 2, 3]),
        ("uni_pc", [0, 1, 2, 3]),
        ("heun", [0, 0, 1, 1, 2, 2, 3]),
        ("heunpp2", [0, 0, 0, 1, 1, 1, 2, 2, 3]),
        ("dpm_2_ancestral", [0, 0, 1, 1, 2, 2, 3]),
        ("seeds_3", [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]),
    ],
)
def test_steps_of_samplers_as_they_are_written(
    sampler: str, calls: list[int], steps: int, model: Any, concept: Any
) -> None:
    run = blended(model, concept, steps, sampler)
    assert [name for name, _ in run.calls] == ["first" if step < steps else "second" for step in calls]


@pytest.mark.parametrize("sampler", sorted(OWN_STEPS))
def test_samplers_with_steps_of_their_own_are_split_by_noise_level(sampler: str, model: Any, concept: Any) -> None:
    border = float(sigmas_of(model)[2])
    run = blended(model, concept, 2, sampler)
    assert {name for name, _ in run.calls} == {"first", "second"}
    for name, sigma in run.calls:
        assert name == ("first" if sigma > border * (1 + 1e-4) else "second")


def test_a_recurrent_sampler(model: Any, concept: Any) -> None:
    sampler = SelfRecurrenceNode.execute(comfy.samplers.sampler_object("heun"), 2, 0.0, 1.0, 0).args[0]
    run = blended(model, concept, 2, sampler)
    assert [name for name, _ in run.calls].count("first") == 2 * 2 * 2


@pytest.mark.parametrize("sampler", ["euler_ancestral", "heun", "dpmpp_2m", "dpmpp_sde", "lms", "uni_pc", "ddim"])
def test_one_model_twice_is_that_model(sampler: str, model: Any) -> None:
    # What these remember from step to step goes over from one model to the other.
    guider = guider_of(model, model, 2, personalised_positive=prompt(1), personalised_cfg=3.0)
    assert torch.equal(sample_with(guider, sampler), alone(model, prompt(1), 3.0, sampler))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m_sde"])
def test_no_step_and_all_steps(sampler: str, model: Any, concept: Any) -> None:
    assert torch.equal(blended(model, concept, 0, sampler).picture, alone(concept, prompt(11), 2.0, sampler))
    assert torch.equal(blended(model, concept, STEPS, sampler).picture, alone(model, prompt(1), 3.0, sampler))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2"])
def test_it_is_two_runs_one_after_the_other(sampler: str, model: Any, concept: Any) -> None:
    """With samplers that remember nothing between steps: the first steps by one, the rest from there by the other."""
    sigmas = sigmas_of(model)
    half = alone(model, prompt(1), 3.0, sampler, sigmas=sigmas[:3])
    silent = {"noise": torch.zeros_like(half), "latent_image": half}
    right = alone(concept, prompt(11), 2.0, sampler, sigmas=sigmas[2:], **silent)
    result = blended(model, concept, 2, sampler).picture
    assert difference(result, right) < ROUNDING
    assert difference(result, alone(concept, prompt(11), 2.0, sampler)) > 0.003
    assert difference(result, alone(model, prompt(1), 3.0, sampler)) > 0.003


@pytest.mark.parametrize("steps", [1, 3])
def test_two_checkpoints(steps: int, model: Any) -> None:
    other = small_model(seed=9)
    sigmas = sigmas_of(model)
    half = alone(model, prompt(1), 3.0, sigmas=sigmas[: steps + 1])
    silent = {"noise": torch.zeros_like(half), "latent_image": half}
    right = alone(other, prompt(11), 2.0, sigmas=sigmas[steps:], **silent)
    assert difference(blended(model, other, steps).picture, right) < ROUNDING


def test_a_sampler_that_asks_for_the_unconditional_prediction(model: Any, concept: Any) -> None:
    """The second model gives it too, at CFG 1 as well, where the host would leave it out."""
    sigmas, sampler = sigmas_of(model), "euler_cfg_pp"
    half = alone(model, prompt(1), 3.0, sampler, sigmas=sigmas[:3])
    silent = {"noise": torch.zeros_like(half), "latent_image": half}
    right = alone(concept, prompt(11), 1.0, sampler, sigmas=sigmas[2:], **silent)
    result = sample_with(guider_of(model, concept, 2, personalised_cfg=1.0), sampler)
    assert difference(result, right) < ROUNDING
    assert difference(result, sample_with(guider_of(model, concept, 2, personalised_cfg=1.0), "euler")) > 0.003


# Both models are whole


def test_each_models_patches_act_in_its_steps(model: Any, concept: Any) -> None:
    sites = frozenset(site for site in attention_sites(model) if site.kind == "self")
    looks = [Look(sites, Window()), Look(sites, Window())]
    first, second = (add_edit(recycled(m), look) for m, look in zip((model, concept), looks, strict=True))
    run = blended(first, second, 2)
    sigmas = [level for _, level in run.calls]
    for look, levels in zip(looks, (sigmas[:2], sigmas[2:]), strict=True):
        assert sorted({seen.sigma for seen in look.of("positive")}, reverse=True) == levels
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


def test_an_inpainting_mask(model: Any, concept: Any) -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    scene = torch.randn(1, 4, 8, 8, generator=generator(8))
    result = sample_with(guider_of(model, concept, 2), latent_image=scene, mask=mask)
    assert difference(result[..., :4], scene[..., :4]) < ROUNDING
    assert difference(result[..., 4:], scene[..., 4:]) > 0.1


def test_in_the_hosts_sampler_node(model: Any, concept: Any) -> None:
    latent = {"samples": latent_noise(1, (8, 8), SEED)}
    (noise,) = DisableNoise.execute().args
    with torch.inference_mode():
        output, _ = SamplerCustomAdvanced.execute(
            noise, guider_of(model, concept, 2), comfy.samplers.sampler_object("euler"), sigmas_of(model), latent
        ).args
    assert output["samples"].isfinite().all()


# Bad input


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


# The plan


def test_steps_of_calls() -> None:
    sigmas = [9.0, 4.0, 1.0, 0.0]
    heun = [Call(9), Told(0), Call(4), Call(4), Told(1), Call(1), Call(1), Told(2)]
    assert steps_of_calls(heun, sigmas) == (0, 0, 1, 1, 2)
    assert steps_of_calls([Call(9), Told(0), Call(4), Told(1), Call(1), Told(2)], sigmas) == (0, 1, 2)
    # Fewer steps than sigmas, more, at other levels, none.
    for events in (
        [Call(9), Told(0), Call(1), Told(1)],
        [*heun, Call(0.5), Told(3)],
        [Call(9), Told(0), Call(3), Told(1), Call(1), Told(2)],
        [],
    ):
        assert steps_of_calls(events, sigmas) is None


def test_step_at_a_noise_level() -> None:
    sigmas = [9.0, 4.0, 1.0, 0.0]
    levels = (10.0, 9.0, 5.0, 4.0, 3.9, 1.0, 0.5, 0.0)
    assert [step_at(level, sigmas) for level in levels] == [0, 0, 0, 1, 1, 2, 2, 3]
    plan = StepPlan((9.0, 4.0, 1.0, 0.0), (0, 0, 1))
    assert [plan.next(level) for level in (9.0, 4.0, 4.0, 1.0)] == [0, 0, 1, 2]
