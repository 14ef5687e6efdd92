"""Companion streams: what their latents are at each noise level, and what they keep."""

from __future__ import annotations

import itertools

import pytest
import torch
from subject_patches.patches.engine.denoising import Denoising
from subject_patches.patches.engine.streams import NoisedReference, Pass, Trajectory
from subject_patches.patches.parts.masks import resize_mask, tokens_inside
from subject_patches.patches.parts.sites import Site
from subject_patches.tests.shared.models import randn
from torch import Tensor

SITE = Site("self", "middle", 0, 0)


def scaling(sigma: float, noise: Tensor, latents: Tensor) -> Tensor:
    return latents + sigma * noise


# A noised reference


def test_one_fixed_noise_at_every_level() -> None:
    clean = randn(1, 4, 5, 7)
    stream = NoisedReference(clean, seed=3)
    noise = stream.latents(1.0, scaling) - clean
    torch.testing.assert_close(noise, randn(1, 4, 5, 7, seed=3))
    torch.testing.assert_close(stream.latents(5.0, scaling) - clean, 5 * noise, rtol=1e-4, atol=1e-5)
    assert not torch.equal(NoisedReference(clean, seed=4).latents(1.0, scaling), stream.latents(1.0, scaling))


def test_a_rows_noise_does_not_depend_on_the_other_rows() -> None:
    # An odd number of values a row: generators fill tensors in blocks.
    clean = randn(3, 4, 5, 7)
    together = NoisedReference(clean, seed=3).latents(1.0, scaling)
    assert torch.equal(NoisedReference(clean[:1], seed=3).latents(1.0, scaling), together[:1])
    assert torch.equal(NoisedReference(clean[:2], seed=3).latents(1.0, scaling), together[:2])
    noise = together - clean
    assert (noise[0] - noise[1]).abs().max() > 0.1


def test_keeps_the_tokens_inside_the_mask_of_all_rows() -> None:
    mask = torch.zeros(2, 4, 6)
    mask[0, :2], mask[1, :, 4:] = 1, 1
    stream = NoisedReference(randn(2, 4, 4, 6), 0, mask=mask)
    key = torch.arange(2 * 24.0).view(2, 24, 1)
    kept = stream.keep(SITE, (4, 6), {"key": key, "value": key + 100})
    right = [*range(12), *(24 + 6 * row + column for row in range(4) for column in (4, 5))]
    assert kept["key"].shape == (1, 20, 1)
    assert kept["key"].flatten().tolist() == right
    assert kept["value"].flatten().tolist() == [100 + token for token in right]
    stream.mask = None
    assert stream.keep(SITE, (4, 6), {"key": key})["key"].shape == (1, 48, 1)


def test_only_a_named_reference_has_an_identity() -> None:
    assert NoisedReference(randn(1, 4, 2, 2), 5).identity() is None
    assert NoisedReference(randn(1, 4, 2, 2), 5, name=("a", 1)).identity() == ("a", 1, 5, Pass())


# Masks at a grid


def test_resized_masks_are_averages() -> None:
    mask = torch.zeros(1, 4, 4)
    mask[:, :2, :3] = 1
    assert resize_mask(mask, (2, 2)).tolist() == [[[1.0, 0.5], [0.0, 0.0]]]
    assert resize_mask(mask, (4, 4)).equal(mask)
    assert resize_mask(mask, (8, 8))[0, 3, 5] == 1


def test_a_token_is_inside_when_half_of_it_is() -> None:
    mask = torch.zeros(1, 4, 4)
    mask[:, :2, :3] = 1
    assert tokens_inside(mask, (2, 2)).tolist() == [[True, True, False, False]]
    mask[:, :2, 2] = 0.9
    assert tokens_inside(mask, (2, 2)).tolist() == [[True, False, False, False]]


def test_a_small_subject_is_never_lost() -> None:
    mask = torch.zeros(2, 8, 8)
    mask[0, 6, 1] = 1
    mask[1, :4] = 1
    assert tokens_inside(mask, (2, 2)).tolist() == [[False, False, True, False], [True, True, False, False]]
    assert tokens_inside(mask, (1, 1)).tolist() == [[True], [True]]


# A trajectory


def test_a_trajectory_gives_its_states_and_lines_between() -> None:
    sigmas, states = torch.tensor([8.0, 4.0, 1.0, 0.0]), randn(4, 2, 4, 3, 3)
    stream = Trajectory(sigmas, states)
    assert stream.shape == (2, 4, 3, 3)
    for sigma, state in zip(sigmas.tolist(), states, strict=True):
        assert torch.equal(stream.latents(sigma, scaling), state)
    torch.testing.assert_close(stream.latents(2.5, scaling), (states[1] + states[2]) / 2)
    torch.testing.assert_close(stream.latents(0.25, scaling), states[2] * 0.25 + states[3] * 0.75)


def test_a_trajectory_takes_rounded_noise_levels() -> None:
    sigmas = torch.tensor([14.6146, 3.1, 0.0292])
    stream = Trajectory(sigmas, randn(3, 1, 4, 3, 3))
    assert torch.equal(stream.latents(float(sigmas[0]) * (1 + 1e-6), scaling), stream.states[0])
    assert torch.equal(stream.latents(float(sigmas[1]) - 1e-6, scaling), stream.states[1])


@pytest.mark.parametrize("sigma", [9.0, 0.5])
def test_a_trajectory_has_an_end(sigma: float) -> None:
    with pytest.raises(ValueError, match=f"runs from sigma 8 to 1 but is needed at {sigma:g}; invert"):
        Trajectory(torch.tensor([8.0, 1.0]), randn(2, 1, 4, 3, 3)).latents(sigma, scaling)


# A branch that denoises by itself


def predicted(sigma: float, state: Tensor) -> Tensor:
    """A stand-in for the model: any smooth function of both."""
    return torch.tanh(state) * (1 + sigma) ** -0.5


def run(stream: Denoising, sigmas: list[float]) -> list[Tensor]:
    states = []
    for sigma in sigmas:
        states.append(stream.latents(sigma, scaling))
        stream.denoised(sigma, predicted(sigma, states[-1]))
    return states


def euler(start: Tensor, sigmas: list[float]) -> list[Tensor]:
    states = [start]
    for sigma, following in itertools.pairwise(sigmas):
        slope = (states[-1] - predicted(sigma, states[-1])) / sigma
        states.append(states[-1] + slope * (following - sigma))
    return states


def test_a_branch_takes_eulers_steps() -> None:
    sigmas, start = [10.0, 6.0, 2.0, 0.5, 0.0], randn(1, 4, 3, 3)
    for state, right in zip(run(Denoising(start, lambda sigma: start), sigmas), euler(start, sigmas), strict=True):
        torch.testing.assert_close(state, right)


def test_a_branch_asked_twice_at_one_level_stays_there() -> None:
    start = randn(1, 4, 3, 3)
    states = run(Denoising(start, lambda sigma: start), [10.0, 6.0, 6.0, 2.0])
    assert torch.equal(states[1], states[2])
    torch.testing.assert_close(states[3], euler(start, [10.0, 6.0, 2.0])[2])


def test_a_branch_goes_back_with_its_sampler() -> None:
    start = randn(1, 4, 3, 3)
    states = run(Denoising(start, lambda sigma: start), [10.0, 6.0, 2.0, 6.0, 1.0])
    assert torch.equal(states[3], states[1])
    torch.testing.assert_close(states[4], euler(start, [10.0, 6.0, 1.0])[2])
    # Between two levels it has visited, and above its first.
    branch = Denoising(start, lambda sigma: start)
    run(branch, [10.0, 2.0])
    torch.testing.assert_close(branch.latents(5.0, scaling), euler(start, [10.0, 5.0])[1])
    assert torch.equal(branch.latents(12.0, scaling), start)


def test_a_branch_needs_its_prediction() -> None:
    branch = Denoising(randn(1, 4, 3, 3), lambda sigma: randn(1, 4, 3, 3))
    branch.latents(10.0, scaling)
    with pytest.raises(ValueError, match=r"no prediction at sigma 10 to step on to 6"):
        branch.latents(6.0, scaling)
