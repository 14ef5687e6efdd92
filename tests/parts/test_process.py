"""Noise levels of diffusions and flows, against the host's own forward processes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from comfy.model_base import ModelType
from comfy.model_sampling import ModelSamplingDiscrete
from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM
from subject_patches.patches.mechanisms.layout import eta
from subject_patches.patches.parts.process import HIGHEST, Process
from subject_patches.tests.shared.dit_models import dit_model
from subject_patches.tests.shared.models import randn, small_model
from torch import Tensor

DIFFUSION, FLOW = Process(), Process(flow=True)
SCALED = Process(flow=True, scale=8.0)
EVERY = pytest.mark.parametrize("process", [DIFFUSION, FLOW, SCALED], ids=["diffusion", "flow", "scaled flow"])


@pytest.mark.parametrize(
    ("name", "process"),
    [("FLUX.1", FLOW), ("Wan", FLOW), ("SD 3.5", FLOW), ("Cosmos-Predict2", DIFFUSION), ("Anima", FLOW)],
)
def test_process_of_the_hosts_models(name: str, process: Process) -> None:
    model = dit_model(name)
    sampling = model.get_model_object("model_sampling")
    assert Process.of(sampling) == process
    assert (model.model.model_type in (ModelType.FLOW, ModelType.FLUX)) == process.flow
    assert float(sampling.sigma_max) == (1.0 if process.flow else 80.0)
    noise, clean = randn(1, 4, 3, 3), randn(1, 4, 3, 3, seed=1)
    # The host's latents have noise over signal in this ratio.
    for sigma in (0.1, 0.5, 0.9):
        noised = sampling.noise_scaling(torch.tensor(sigma), noise.clone(), clean)
        signal = (1 - sigma) if process.flow else 1.0
        torch.testing.assert_close(noised / signal, clean + process.ratio(sigma) * noise)


def test_process_of_a_diffusion() -> None:
    assert Process.of(small_model().get_model_object("model_sampling")) == DIFFUSION
    assert [DIFFUSION.ratio(sigma) for sigma in (0.0, 3.0, 20.0)] == [0.0, 3.0, 20.0]


def test_the_first_guess_is_what_the_network_sees() -> None:
    """Latents over what the host divides them by, also where that is of another spread (EDM)."""
    (edm,) = ModelSamplingContinuousEDM().patch(small_model(), "edm", 120.0, 0.002)
    for model in (small_model(), edm):
        sampling = model.get_model_object("model_sampling")
        below = randn(1, 4, 3, 3)
        guess = Process.of(sampling).first_guess(below, 0.4, 2.0)
        seen = [
            sampling.calculate_input(torch.tensor(sigma), latents) for sigma, latents in ((0.4, below), (2.0, guess))
        ]
        torch.testing.assert_close(*seen)
    assert Process.of(edm.get_model_object("model_sampling")).spread == 0.5


@pytest.mark.parametrize("process", [FLOW, SCALED])
def test_the_ratio_of_a_flow(process: Process) -> None:
    assert process.ratio(0.0) == 0.0
    assert process.ratio(0.5) == process.scale
    assert process.ratio(1.0) == HIGHEST
    ratios = [process.ratio(n / 1000) for n in range(1001)]
    assert ratios == sorted(ratios)
    # It gets there without a jump.
    most = HIGHEST / (process.scale + HIGHEST)
    assert process.ratio(most - 1e-9) == pytest.approx(HIGHEST, rel=1e-5)


def test_eta_at_a_flows_process() -> None:
    """As at the diffusion's level of the same noise over signal; the code's first step has about 5.4."""
    assert eta(FLOW.ratio(1.0)) == pytest.approx(5.37, abs=0.01)
    assert eta(FLOW.ratio(0.5)) == pytest.approx(math.log(2))
    assert eta(FLOW.ratio(0.0)) == 0.0


def forward(process: Process, clean: Tensor, sigma: float, noise: Tensor) -> Tensor:
    return (1 - sigma) * clean + sigma * process.scale * noise if process.flow else clean + sigma * noise


@EVERY
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.7), (0.0, 0.5), (0.4, 1.0), (0.6, 0.6)])
def test_noising_back_is_the_forward_process(process: Process, low: float, high: float) -> None:
    clean, (first, second) = torch.full((400_000,), 3.0), (randn(400_000), randn(400_000, seed=1))
    at = forward(process, clean, low, first)
    back = process.renoised(at, torch.tensor(low), torch.tensor(high), second)
    right = forward(process, clean, high, randn(400_000, seed=2))
    assert float(back.mean()) == pytest.approx(float(right.mean()), abs=0.01 * process.scale)
    assert float(back.std()) == pytest.approx(float(right.std()), rel=0.01)
    if low == high:
        torch.testing.assert_close(back, at)


def test_the_first_guess_is_what_the_network_saw() -> None:
    below = randn(1, 4, 3, 3)
    assert torch.equal(FLOW.first_guess(below, 0.2, 0.6), below)
    guess = DIFFUSION.first_guess(below, 1.0, 3.0)
    torch.testing.assert_close(guess / math.sqrt(10), below / math.sqrt(2))


def test_eta_is_never_more_than_stable_diffusions() -> None:
    """Zero terminal SNR, whose first sigma is 4519; EDM's schedules; and with them every schedule by its own levels."""
    usual = ModelSamplingDiscrete()
    steep = ModelSamplingDiscrete(zsnr=True)
    highest = eta(float(usual.sigma_max))
    assert highest == pytest.approx(math.log1p(float(usual.sigma_max) ** 2), abs=1e-5)
    assert eta(float(steep.sigma_max)) == eta(120.0) == pytest.approx(highest, abs=1e-5)
    ratios = [eta(float(other)) / eta(float(own)) for own, other in zip(usual.sigmas, steep.sigmas, strict=True)]
    assert max(ratios) < 1.35
    falling = [eta(float(sigma)) for sigma in steep.sigmas.flip(0)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(falling))
