"""Inpainting U-Nets and noise masks: region customisation and outpainting (AnyLogo, Eq. 2)."""

from __future__ import annotations

from typing import Any

import node_helpers
import pytest
import torch
from subject_patches.tests.shared.models import (
    Conditioning,
    difference,
    generator,
    inputs_of,
    prompt,
    recycled,
    sample,
    small_model,
    subject,
)
from torch import Tensor

SIZE = (9, 12)
SCENE = torch.randn(1, 4, *SIZE, generator=generator(50))


def painted() -> Tensor:
    """Where to paint, in latent pixels."""
    mask = torch.zeros(1, 1, *SIZE)
    mask[..., 2:7, 3:10] = 1
    return mask


def inpainting(seed: int, mask: Tensor) -> Conditioning:
    """What InpaintModelConditioning gives, with the masked picture's latents made up."""
    masked = SCENE * (1 - mask)
    return node_helpers.conditioning_set_values(prompt(seed), {"concat_latent_image": masked, "concat_mask": mask})


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model(in_channels=9)


def paint(model: Any, mask: Tensor, **run: Any) -> Tensor:
    prompts = {"positive": inpainting(1, mask), "negative": inpainting(2, mask)} if is_inpainting(model) else {}
    return sample(model, size=SIZE, latent=SCENE, mask=mask, **prompts, **run)


def is_inpainting(model: Any) -> bool:
    return model.model.diffusion_model.in_channels == 9


def test_reference_pass_shows_an_inpainting_model_the_whole_reference(model: Any) -> None:
    who = subject()
    with inputs_of(model) as calls:
        paint(recycled(model, (who,)), painted())
    inputs = [(call["x"], call["x"][:, 4:]) for call in calls]
    clean = who.references[0].latents
    passes = [extra for x, extra in inputs if x.shape[-2:] == clean.shape[-2:]]
    assert len(passes) == 2
    for extra in passes:
        # One channel of mask: nothing is hidden; four of the picture, in the model's own latent space.
        assert torch.equal(extra[:, :1], torch.zeros(1, 1, *clean.shape[-2:]))
        torch.testing.assert_close(extra[:, 1:], clean * model.model.latent_format.scale_factor)
    # The generation's own extra channels stay what they were.
    own = [extra for x, extra in inputs if x.shape[-2:] == SIZE]
    assert all(torch.equal(extra[:1, :1], painted()) for extra in own)


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("outwards", [False, True], ids=["inside", "around"])
def test_paints_the_subject_inside_the_mask_only(channels: int, outwards: bool) -> None:
    model = small_model(in_channels=channels)
    mask = 1 - painted() if outwards else painted()
    plain, patched = paint(model, mask), paint(recycled(model), mask)
    inside = mask[0, 0] > 0
    assert patched.isfinite().all()
    assert difference(patched[..., inside], plain[..., inside]) > 0.01
    assert torch.equal(patched[..., ~inside], plain[..., ~inside])
    torch.testing.assert_close(patched[..., ~inside], SCENE[..., ~inside], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conditioned", [True, False], ids=["with its conditioning", "with a prompt only"])
def test_inpainting_model_in_a_batch_of_odd_size(conditioned: bool, model: Any) -> None:
    prompts = {"positive": inpainting(1, painted()), "negative": inpainting(2, painted())} if conditioned else {}
    patched = recycled(model, strength=2.0)
    together = sample(patched, size=SIZE, batch=2, **prompts)
    alone = sample(patched, size=SIZE, seed=6, **prompts)
    assert difference(together[1:], alone) < 2e-5
    assert difference(alone, sample(model, size=SIZE, seed=6, **prompts)) > 0.01


def test_strength_0_is_unpatched(model: Any) -> None:
    assert torch.equal(paint(recycled(model, strength=0.0), painted()), paint(model, painted()))


def test_each_picture_of_a_batch_may_have_its_own_noise_mask(model: Any) -> None:
    both = torch.cat([painted(), 1 - painted()])
    result = sample(recycled(small_model()), size=SIZE, batch=2, latent=SCENE.repeat(2, 1, 1, 1), mask=both)
    for row, mask in enumerate(both):
        outside = mask[0] == 0
        torch.testing.assert_close(result[row][:, outside], SCENE[0][:, outside], rtol=1e-4, atol=1e-4)
