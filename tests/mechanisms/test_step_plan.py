"""Step blending: exactly the first steps are the first model's, with every sampler of the host."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import pytest
import torch
from subject_patches.nodes.self_recurrence import SelfRecurrenceNode
from subject_patches.patches.mechanisms.step_plan import Call, StepPlan, Told, step_at, steps_of_calls
from subject_patches.tests.shared.models import (
    difference,
    levels,
    prompt,
    small_model,
)
from subject_patches.tests.shared.step_blending import (
    ROUNDING,
    STEPS,
    alone,
    blended,
    concept_of,
    guider_of,
    sample_with,
    watched,
)


@pytest.fixture(scope="module")
def concept(model: Any) -> Any:
    return concept_of(model)


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
    border = float(levels(model, STEPS)[2])
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
    sigmas = levels(model, STEPS)
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
    sigmas = levels(model, STEPS)
    half = alone(model, prompt(1), 3.0, sigmas=sigmas[: steps + 1])
    silent = {"noise": torch.zeros_like(half), "latent_image": half}
    right = alone(other, prompt(11), 2.0, sigmas=sigmas[steps:], **silent)
    assert difference(blended(model, other, steps).picture, right) < ROUNDING


def test_a_sampler_that_asks_for_the_unconditional_prediction(model: Any, concept: Any) -> None:
    """The second model gives it too, at CFG 1 as well, where the host would leave it out."""
    sigmas, sampler = levels(model, STEPS), "euler_cfg_pp"
    half = alone(model, prompt(1), 3.0, sampler, sigmas=sigmas[:3])
    silent = {"noise": torch.zeros_like(half), "latent_image": half}
    right = alone(concept, prompt(11), 1.0, sampler, sigmas=sigmas[2:], **silent)
    result = sample_with(guider_of(model, concept, 2, personalised_cfg=1.0), sampler)
    assert difference(result, right) < ROUNDING
    assert difference(result, sample_with(guider_of(model, concept, 2, personalised_cfg=1.0), "euler")) > 0.003


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
