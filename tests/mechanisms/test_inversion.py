"""Invert to Trajectory: DDIM inversion with all latents kept, in sampling runs of the host."""

from __future__ import annotations

import re
from functools import partial
from itertools import pairwise
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingSD3
from subject_patches.patches.mechanisms.inversion import (
    ddim_step,
    inverted,
    inverted_step,
    replayed,
)
from subject_patches.patches.parts.process import Process
from subject_patches.tests.shared.inversions import invert, inverted_with_noise
from subject_patches.tests.shared.models import (
    CONTEXT,
    difference,
    levels,
    prompt,
    randn,
    recycled,
    sample,
    small_model,
)
from subject_patches.toy.sampling import Toy
from torch import Tensor

ROUNDING = 2e-5


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy.load()


# The equations


def test_a_step_and_its_inverse() -> None:
    x, clean = randn(2, 4, 3, 5), randn(2, 4, 3, 5, seed=1)
    below = ddim_step(x, clean, 3.0, 1.2)
    torch.testing.assert_close(inverted_step(below, clean, x, 1.2, 3.0), x)
    # The host's Euler step.
    torch.testing.assert_close(below, x + (x - clean) / 3.0 * (1.2 - 3.0))
    torch.testing.assert_close(ddim_step(x, clean, 3.0, 0.0), clean)


def model_of_a_unit_gaussian(x: Tensor, sigma: float) -> Tensor:
    """The exact prediction where clean latents are of unit variance."""
    return x / (1 + sigma**2)


def nothing(*_: Tensor) -> None:
    pass


def test_a_gaussians_path_is_its_scale() -> None:
    """Of the exact model the path is sqrt(1 + sigma^2) times the picture; fine steps come near it."""
    sigmas, clean = torch.linspace(5, 0, 400), randn(1, 4, 3, 3)
    states = inverted(model_of_a_unit_gaussian, clean, sigmas, 3, nothing)
    right = clean * (1 + sigmas.square()).sqrt().view(-1, 1, 1, 1, 1)
    assert difference(states, right) < 0.02


@pytest.mark.parametrize("rounds", [1, 4])
def test_rounds_lead_back_better(rounds: int) -> None:
    sigmas, clean = torch.tensor([5.0, 3.0, 1.0, 0.4, 0.0]), randn(1, 4, 3, 3)

    def drift(turns: int) -> float:
        states = inverted(model_of_a_unit_gaussian, clean, sigmas, turns, nothing)
        return difference(replayed(model_of_a_unit_gaussian, states[0], sigmas, nothing)[-1], clean)

    assert drift(rounds) < 0.5 * drift(0)
    assert drift(12) < 1e-3


def test_rounds_that_lead_away_are_left_out() -> None:
    """A model whose fixed point repels: more rounds give what two do."""

    def steep(x: Tensor, sigma: float) -> Tensor:
        return x - 3 * sigma * x

    sigmas, clean = torch.tensor([2.0, 1.0, 0.0]), randn(1, 4, 3, 3)
    two, many = (inverted(steep, clean, sigmas, rounds, nothing) for rounds in (2, 10))
    assert torch.equal(two, many)
    assert many.abs().max() < 100 * clean.abs().max()


def test_each_row_has_rounds_of_its_own() -> None:
    """One whose fixed point repels beside one whose does not: both as alone."""

    def predict(x: Tensor, sigma: float, steep: Tensor) -> Tensor:
        return torch.where(steep, x - 3 * sigma * x, model_of_a_unit_gaussian(x, sigma))

    sigmas, clean = torch.tensor([2.0, 1.0, 0.0]), randn(2, 4, 3, 3)
    steep = torch.tensor([True, False]).view(2, 1, 1, 1)
    both = inverted(partial(predict, steep=steep), clean, sigmas, 10, nothing)
    for row in (0, 1):
        at = slice(row, row + 1)
        alone = inverted(partial(predict, steep=steep[at]), clean[at], sigmas, 10, nothing)
        assert torch.equal(both[:, at], alone)


def test_a_flows_path_is_euler_upwards() -> None:
    """Of the exact flow of unit gaussians the path is the picture times the level's spread; fine steps come near it."""
    sigmas, clean = torch.linspace(1, 0, 400), randn(1, 4, 3, 3)

    def predict(x: Tensor, sigma: float) -> Tensor:
        return x * (1 - sigma) / ((1 - sigma) ** 2 + sigma**2)

    states = inverted(predict, clean, sigmas, 3, nothing, Process(flow=True))
    right = clean * ((1 - sigmas).square() + sigmas.square()).sqrt().view(-1, 1, 1, 1, 1)
    assert difference(states, right) < 0.02
    # Plain inversion, without rounds, takes the velocity at the latents it has.
    plain = inverted(predict, clean, torch.tensor([0.5, 0.0]), 0, nothing, Process(flow=True))[0]
    torch.testing.assert_close(plain, clean + (clean - predict(clean, 0.5)))


# In the host


@pytest.mark.parametrize("shift", [None, 3.0], ids=["diffusion", "flow"])
def test_a_run_begins_with_the_noise(shift: float | None, model: Any) -> None:
    patched = model if shift is None else ModelSamplingSD3().patch(model, shift)[0]
    sigmas = levels(patched, 6, "simple")
    latent = randn(1, 4, 6, 8)
    trajectory, _, report, noise = inverted_with_noise(patched, latent, sigmas, measure_replay=True)
    assert torch.equal(trajectory.states[-1], patched.model.process_latent_in(latent))
    empty = {"samples": torch.zeros_like(latent)}
    started = noise.generate_noise(empty)
    rest = (prompt(1), prompt(2), empty["samples"])
    with torch.inference_mode():
        result = comfy.sample.sample_custom(
            patched, started, 1.0, comfy.samplers.sampler_object("euler"), sigmas, *rest, disable_pbar=True, seed=0
        )
    (percent,) = re.findall(r"at the picture that is ([\d.]+)%", report)
    # The host's sampler goes the way that the node replayed, and misses the picture by as much.
    missed = (patched.model.process_latent_in(result) - trajectory.states[-1]).square().mean().sqrt()
    assert float(missed / trajectory.states[-1].std()) == pytest.approx(float(percent) / 100, rel=0.01)


def plain(model: Any, clean: Tensor, sigmas: Tensor, tokens: Tensor) -> Tensor:
    """DDIM inversion in its usual writing: z of unit variance, alpha-bar, the time step of the noisier side."""
    x = clean * model.model.latent_format.scale_factor
    states = [x]
    for low, high in pairwise(sigmas.flip(0)):
        below, above = 1 / (1 + low**2), 1 / (1 + high**2)
        z = below.sqrt() * x
        denoised = model.model.apply_model(
            z / above.sqrt(), high.expand(len(x)), c_crossattn=tokens.expand(len(x), -1, -1)
        )
        noise = (z / above.sqrt() - denoised) / high
        z = above.sqrt() / below.sqrt() * (z - (1 - below).sqrt() * noise) + (1 - above).sqrt() * noise
        x = z / above.sqrt()
        states.append(x)
    return torch.stack(states[::-1])


@pytest.mark.parametrize("prediction", ["eps", "v_prediction", "v_prediction zsnr"])
def test_ddim_inversion(prediction: str, model: Any) -> None:
    bare = small_model()
    if prediction != "eps":
        name, *zsnr = prediction.split()
        (model,) = ModelSamplingDiscrete().patch(model, name, bool(zsnr))
        bare.model.model_sampling = model.get_model_object("model_sampling")
    clean = randn(2, 4, 7, 10)
    sigmas = levels(model, 4)
    with torch.inference_mode():
        right = plain(bare, clean, sigmas, prompt(1)[0][0])
    inversion, last, _ = invert(model, clean)
    assert torch.equal(inversion.sigmas, sigmas)
    assert inversion.states.shape == (5, 2, 4, 7, 10)
    assert inversion.states.isfinite().all()
    for ours, theirs in zip(inversion.states, right, strict=True):
        assert difference(ours, theirs) < ROUNDING
    torch.testing.assert_close(last["samples"] * model.model.latent_format.scale_factor, inversion.states[0])


def test_kept_latents_are_exact_and_a_replay_drifts(toy: Toy) -> None:
    clean, sigmas = randn(1, 8, 16, 16), levels(toy.model, 6)
    with torch.inference_mode():
        clean = toy.model.model.process_latent_out(clean)
    inversion, _, report = invert(toy.model, clean, sigmas, conditioning=None, clip=toy.clip, measure_replay=True)
    stream = inversion.stream
    for sigma, state in zip(inversion.sigmas.tolist(), inversion.states, strict=True):
        assert torch.equal(stream.latents(sigma, nothing), state)
    assert "error with the kept latents: 0 at every sigma" in report
    errors = [float(line.split()[1]) for line in report.splitlines()[4:-1]]
    assert len(errors) == len(sigmas)
    assert errors[0] == 0
    assert errors[-1] > 0.01
    *_, refined = invert(
        toy.model, clean, sigmas, conditioning=None, clip=toy.clip, measure_replay=True, fixed_point_rounds=5
    )
    assert float(refined.splitlines()[-2].split()[1]) < 0.5 * errors[-1]


def test_replaying_by_the_hosts_sampler(toy: Toy) -> None:
    """From the last latent, with DisableNoise, the host's Euler goes the way the report's replay went."""
    clean, sigmas = randn(1, 8, 16, 16), levels(toy.model, 6)
    with torch.inference_mode():
        empty = toy.encode([""])
    inversion, last, report = invert(toy.model, clean, sigmas, conditioning=empty, measure_replay=True)
    with torch.inference_mode():
        result = comfy.sample.sample_custom(
            toy.model, torch.zeros_like(clean), 1.0, comfy.samplers.sampler_object("euler"), sigmas, empty, empty,
            last["samples"], disable_pbar=True, seed=0,
        )  # fmt: skip
    error = float((toy.model.model.process_latent_in(result) - inversion.states[-1]).square().mean().sqrt())
    assert error == pytest.approx(float(report.splitlines()[-2].split()[1]), rel=1e-3)


def test_the_empty_prompt_is_the_default(toy: Toy) -> None:
    clean = randn(1, 8, 16, 16)
    with torch.inference_mode():
        empty = toy.encode([""])
    given, default = (
        invert(toy.model, clean, levels(toy.model, 3), **values)[0]
        for values in ({"conditioning": empty}, {"conditioning": None, "clip": toy.clip})
    )
    assert torch.equal(given.states, default.states)


def test_a_batch_is_its_singles(model: Any) -> None:
    clean = randn(2, 4, 7, 10)
    together, _, _ = invert(model, clean)
    for row in (0, 1):
        alone, _, _ = invert(model, clean[row : row + 1])
        assert difference(together.states[:, row : row + 1], alone.states) < ROUNDING


def test_the_models_patches_act(model: Any) -> None:
    clean = randn(1, 4, 8, 8)
    assert difference(invert(recycled(model), clean)[0].states[0], invert(model, clean)[0].states[0]) > 0.003


def test_schedules_may_rise_or_end_early(model: Any) -> None:
    clean, sigmas = randn(1, 4, 8, 8), levels(model, 4)
    right = invert(model, clean, sigmas)[0]
    for given in (sigmas.flip(0), sigmas[:-1], sigmas[:-1].flip(0)):
        other = invert(model, clean, given)[0]
        assert torch.equal(other.sigmas, right.sigmas)
        assert torch.equal(other.states, right.states)


def test_the_given_model_is_untouched(model: Any) -> None:
    before = sample(model)
    invert(model, randn(1, 4, 8, 8))
    assert torch.equal(sample(model), before)


def test_an_inversion_tells_of_its_steps_and_can_be_interrupted(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []

    def progress(done: int, total: int, *_: Any, **__: Any) -> None:
        # The host's server looks for an interrupt here.
        told.append((done, total))
        if done == 2:
            comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    with monkeypatch.context() as patches:
        patches.setattr(comfy.utils, "PROGRESS_BAR_HOOK", progress)
        patches.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            invert(model, randn(1, 4, 8, 8), fixed_point_rounds=1)
    # Of four steps, each done twice.
    assert told == [(1, 8), (2, 8)]
    assert invert(model, randn(1, 4, 8, 8))[0].states.isfinite().all()


def test_a_trajectory_keeps_levels_of_its_own(model: Any) -> None:
    """The host's uni_pc writes into the SIGMAS that it is given."""
    sigmas = levels(model, 4)
    right = sigmas.clone()
    inversion, *_ = invert(model, randn(1, 4, 8, 8), sigmas)
    sigmas[-1] = 0.001
    assert torch.equal(inversion.sigmas, right)
    assert torch.equal(invert(model, randn(1, 4, 8, 8), sigmas)[0].states, inversion.states)


# Bad input


@pytest.mark.parametrize(
    ("shape", "fits"), [((2, 4, 6, 8), True), ((1, 4, 6, 8), True), ((3, 4, 6, 8), False), ((2, 4, 8, 6), False)]
)
def test_noise_for_another_latent(shape: tuple[int, ...], fits: bool, model: Any) -> None:
    """It ended in torch's error over a shape, in the host's sampler."""
    *_, noise = inverted_with_noise(model, randn(2, 4, 6, 8), levels(model, 2))
    latent = {"samples": torch.zeros(shape)}
    if fits:
        assert noise.generate_noise(latent).shape == (2, 4, 6, 8)
        return
    with pytest.raises(
        ValueError, match=r"noise has the shape \(2, 4, 6, 8\) but the sampler's latent \(.*\); give the"
    ):
        noise.generate_noise(latent)


def test_a_prompt_is_needed(model: Any) -> None:
    with pytest.raises(ValueError, match="no prompt to invert with; connect a CLIP"):
        invert(model, randn(1, 4, 8, 8), conditioning=None)


def test_a_clip_of_another_family(toy: Toy, model: Any) -> None:
    """Its prompts have another width than the model's, which ended in torch's error over a shape. A network that
    another pack made may read them all the same, and so may one that has a function before it."""
    clean, width = randn(1, 4, 8, 8), toy.encode([""])[0][0].shape[-1]
    with pytest.raises(
        ValueError, match=f"CLIP's empty prompt is {width} wide, but this model takes .* {CONTEXT} wide"
    ):
        invert(model, clean, conditioning=None, clip=toy.clip)
    other = small_model()
    network = other.model.diffusion_model
    network.__class__ = type("Theirs", (type(network),), {"forward": lambda self, x, *_, **__: x})
    wrapped = model.clone()
    wrapped.set_model_unet_function_wrapper(
        lambda apply, given: apply(given["input"], given["timestep"], **{**given["c"], "c_crossattn": prompt(1)[0][0]})
    )
    for each in (other, wrapped):
        assert invert(each, clean, conditioning=None, clip=toy.clip)[0].states.isfinite().all()


def test_latents_of_another_vae(model: Any) -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8, 8\) but this model takes 4 channels; encode the picture"):
        invert(model, randn(1, 8, 8, 8))


@pytest.mark.parametrize("sigmas", [[], [0.0], [3.0, 5.0, 1.0], [5.0, 5.0, 0.0], [float("nan"), 0.0]])
def test_sigmas_that_are_no_levels(sigmas: list[float], model: Any) -> None:
    with pytest.raises(ValueError, match=r"are no schedule; connect those of a scheduler node"):
        invert(model, randn(1, 4, 8, 8), torch.tensor(sigmas))


@pytest.mark.parametrize("rounds", [-1, 21])
def test_rounds_out_of_range(rounds: int, model: Any) -> None:
    with pytest.raises(ValueError, match=f"fixed_point_rounds are {rounds}; give a number from 0 to 20"):
        invert(model, randn(1, 4, 8, 8), fixed_point_rounds=rounds)
    with pytest.raises(ValueError, match="cache_megabytes are -1; give a number from 0 to 65536"):
        invert(model, randn(1, 4, 8, 8), cache_megabytes=-1)
