"""The denoising loss, in every precision, and the pictures that it is of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM, ModelSamplingDiscrete
from hosting.random_models import generator
from subject_patches.tests.shared.forwards import counted_forwards
from subject_patches.tests.shared.models import CONTEXT, small_model
from subject_patches.tests.shared.small_vaes import noting_vae, small_vae
from subject_patches.training.copies import loaded, with_gradients
from subject_patches.training.denoising import Denoiser
from subject_patches.training.images import check_latents, latents_of, pictures_of, square
from subject_patches.training.loop import compute_dtype
from torch import Tensor

pytestmark = pytest.mark.usefixtures("in_inference_mode")

PROMPT = "a dog on the beach"


@pytest.mark.parametrize("as_v", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "v_prediction"])
def test_the_loss_is_that_of_what_the_model_predicts_or_of_v(prediction: str, as_v: bool) -> None:
    model = ModelSamplingDiscrete().patch(small_model(), prediction, False)[0]
    latents = torch.randn(3, 4, 8, 6, generator=generator(1))
    context = torch.randn(1, 7, CONTEXT, generator=generator(2))
    with with_gradients():
        denoiser = Denoiser(model, torch.float32, False, as_v)
        latents, context = latents.clone(), context.clone()
        with loaded(denoiser.patcher):
            loss = denoiser.loss(latents, context, None, generator(3))
            inner = denoiser.patcher.model
            source = generator(3)
            steps = torch.randint(1000, (3,), generator=source)
            noise = torch.randn(latents.shape, generator=source)
            # Stable Diffusion's own words: x_t = alpha x + sigma noise, v = alpha noise - sigma x.
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
            alpha = torch.cumprod(1 - betas, 0).sqrt()[steps].float()[:, None, None, None]
            sigma = (1 - alpha**2).sqrt()
            clean = latents * 0.18215
            predicted = inner.diffusion_model(alpha * clean + sigma * noise, steps.float(), context.repeat(3, 1, 1))
            if prediction == "eps" and as_v:
                noisy = alpha * clean + sigma * noise
                predicted = alpha * predicted - sigma * (noisy - sigma * predicted) / alpha
            target = noise if prediction == "eps" and not as_v else alpha * noise - sigma * clean
            expected = (predicted - target).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)


def test_an_inpainting_model_is_shown_what_is_known() -> None:
    """All of a reference, by a mask of zeros; of a picture that is to be drawn nothing."""
    given: list[Tensor] = []
    latents = torch.randn(2, 4, 8, 6, generator=generator(1))
    with with_gradients():
        denoiser = Denoiser(small_model(in_channels=9), torch.float32, False)
        known, context = latents.clone(), torch.randn(1, 7, CONTEXT, generator=generator(2))
        sigmas = torch.tensor([3.0, 1.0])
        with loaded(denoiser.patcher):
            network = denoiser.patcher.model.diffusion_model
            network.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0].clone()))
            denoiser.denoised(known, sigmas, context, None, known)
            denoiser.denoised(known, sigmas, context, None)
    shown, hidden = given
    assert torch.equal(shown[:, 4], torch.zeros(2, 8, 6))
    torch.testing.assert_close(shown[:, 5:], latents)
    assert torch.equal(hidden[:, 4], torch.ones(2, 8, 6))
    assert not torch.allclose(hidden[:, 5:], latents)


def test_an_error_of_v_where_clean_latents_have_another_spread() -> None:
    """An EDM model's own prediction is v, in units of its sigma_data."""
    (model,) = ModelSamplingContinuousEDM().patch(small_model(), "edm", 120.0, 0.002)
    with with_gradients():
        own, as_v = (Denoiser(model, torch.float32, False, each) for each in (False, True))
        clean = torch.randn(2, 4, 3, 3, generator=generator(1))
        off, sigmas = clean + 0.1, torch.tensor([9.0, 0.3])
        with loaded(own.patcher, as_v.patcher):
            assert as_v.patcher.model.model_sampling.sigma_data == 0.5
            torch.testing.assert_close(as_v.errors(off, clean, sigmas), own.errors(off, clean, sigmas))


def gradient_of_context(model: Any, dtype: torch.dtype, checkpointing: bool) -> tuple[float, Tensor]:
    with with_gradients():
        denoiser = Denoiser(model, dtype, checkpointing)
        context = torch.randn(1, 7, CONTEXT, generator=generator(2)).requires_grad_()
        latents = torch.randn(1, 4, 8, 8, generator=generator(1))
        with loaded(denoiser.patcher), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = denoiser.loss(latents, context, None, generator(3))
            loss.backward()
        assert context.grad is not None
        return float(loss.detach()), context.grad


def test_checkpointing_changes_nothing() -> None:
    """But how often the transformers run."""
    with torch.inference_mode():
        model = small_model()
    with counted_forwards() as once:
        plain, gradient = gradient_of_context(model, torch.float32, False)
    with counted_forwards() as twice:
        kept, same = gradient_of_context(model, torch.float32, True)
    assert twice.count == 2 * once.count > 0
    assert kept == plain
    torch.testing.assert_close(same, gradient)
    assert bool(gradient.any())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_half_precision(dtype: torch.dtype, tolerance: float, checkpointing: bool) -> None:
    model = small_model()
    plain, gradient = gradient_of_context(model, torch.float32, False)
    half, rough = gradient_of_context(model, dtype, checkpointing)
    assert half == pytest.approx(plain, rel=tolerance)
    assert float((rough - gradient).norm() / gradient.norm()) < tolerance


def test_a_precision_of_the_hosts_choice() -> None:
    assert compute_dtype("auto", torch.device("cpu")) == torch.float32
    assert compute_dtype("fp16", torch.device("cpu")) == torch.float16


def test_pictures_of_any_kind_become_squares() -> None:
    batches = [torch.rand(2, 40, 64, 3), torch.rand(1, 64, 40, 4)]
    pictures = pictures_of(batches)
    assert [tuple(each.shape) for each in pictures] == [(1, 40, 64, 3), (1, 40, 64, 3), (1, 64, 40, 3)]
    striped = torch.zeros(1, 32, 96, 3)
    striped[:, :, 32:64] = 1
    assert torch.equal(square(striped, 32), torch.ones(1, 32, 32, 3))


def test_latents_may_be_trained_with() -> None:
    latents = latents_of(small_vae(), [torch.rand(1, 32, 32, 3)] * 2, 4)
    assert latents.shape == (2, 4, 4, 4)
    with with_gradients():
        weight = torch.ones(1, requires_grad=True)
        (latents.clone() * weight).sum().backward()


def test_a_vae_that_gives_no_numbers_is_not_trained_with() -> None:
    vae = noting_vae()
    vae.first_stage_model.encoder.conv_in.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="The VAE gave values that are no numbers for training picture 1; use another"):
        latents_of(vae, [torch.ones(1, 32, 32, 3)], 4)


def test_a_vae_of_another_family_is_not_trained_with() -> None:
    """The first picture tells, also one of a video model."""
    vae = noting_vae(16)
    with pytest.raises(
        ValueError, match=r"of the shape \(1, 16, 4, 4\), but this model takes pictures of 4 channels; use"
    ):
        latents_of(vae, [torch.ones(1, 32, 32, 3)] * 2, 4)
    assert len(vae.given) == 1
    with pytest.raises(
        ValueError, match=r"of the shape \(1, 4, 1, 4, 4\), but this model takes pictures of 4 channels"
    ):
        check_latents(torch.zeros(1, 4, 1, 4, 4), 4)
