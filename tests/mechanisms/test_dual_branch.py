"""Dual-branch integration: what DCI's numbers do not say of its equations."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import comfy.supported_models
import pytest
import torch
from hosting.random_models import SMALL, model_of
from subject_patches.patches.engine.chunk import Chunk
from subject_patches.patches.engine.engine import KEY
from subject_patches.patches.mechanisms.dual_branch import (
    BRANCH_KEY,
    BranchTokens,
    BranchWindow,
    DualBranchIntegration,
    auxiliary_noise,
    concept_weight,
    spread,
)
from subject_patches.tests.shared.models import generator, integrated


def test_noise_is_of_the_seed_and_the_picture_only() -> None:
    noise = torch.randn(3, 4, 5, 7, generator=generator(0))
    made = auxiliary_noise(noise, 3)
    assert made.shape == noise.shape
    for row in range(3):
        assert torch.equal(auxiliary_noise(noise[row : row + 1], 3), made[row : row + 1])
    for other in (noise, auxiliary_noise(noise, 4), made.roll(1, 0)):
        assert abs(float((made * other).mean())) < 0.15
    assert float(made.std()) == pytest.approx(1, abs=0.1)
    # A sampler that adds no noise.
    assert not auxiliary_noise(torch.zeros(1, 4, 5, 7), 3).any()


def test_gain_by_resolution_is_the_authors_at_64_by_64() -> None:
    fixed = DualBranchIntegration(frozenset(), BranchWindow(), BranchTokens((), ()), BranchTokens((), ()), None)
    grown = DualBranchIntegration(
        frozenset(), BranchWindow(), BranchTokens((), ()), BranchTokens((), ()), None, by_resolution=True
    )

    def chunk(latent: tuple[int, int], area: tuple[int, int, int, int] | None = None) -> Chunk:
        return Chunk(slice(0, 1), "positive", True, {}, latent, area)

    assert fixed.gain_at(chunk((32, 96))) == fixed.gain_at(chunk((64, 64))) == grown.gain_at(chunk((64, 64))) == 500
    assert grown.gain_at(chunk((128, 64))) == 1000
    assert grown.gain_at(chunk((128, 64), (64, 32, 8, 8))) == 250
    # FLUX.2's latents are of 16 pixels.
    assert replace(grown, cell=16).gain_at(chunk((32, 32))) == 500
    # The same mask on twice as many places: the same weights.
    mask = torch.rand(2, 8, 64, generator=generator(1))
    torch.testing.assert_close(spread(mask, 500).repeat(1, 1, 2), spread(mask.repeat(1, 1, 2), 1000))


def share_outside(places: int, gain: float, area: float = 0.1) -> float:
    """The concept's weight where it is not, in a layer whose attention tells the concept from the rest outright; it is
    on `area` of the picture. All that is there should be the auxiliary branch's."""
    concept = (torch.arange(places) < round(area * places)).float()
    return float(concept_weight(spread(concept, gain), spread(1 - concept, gain), 1.0)[-1])


@pytest.mark.parametrize(
    ("family", "config", "latent", "finer", "coarser"),
    [
        ("SD15", {}, 64, (4096, 1024), (256, 64)),
        ("SD20", {"model_channels": 64, "use_linear_in_transformer": True}, 96, (9216, 2304), (576, 144)),
        ("SDXL", {"model_channels": 64, "num_classes": "sequential", "adm_in_channels": 1568}, 128, (4096,), (1024,)),
    ],
)
def test_the_usual_gain_tells_the_branches_apart_on_every_family(
    family: str, config: dict[str, Any], latent: int, finer: tuple[int, ...], coarser: tuple[int, ...]
) -> None:
    """At the size that a family is made for, its finer layers leave the concept the share outside itself that SD 1.x's
    finer ones leave at 512 x 512, and so do the coarser ones."""
    model = model_of(getattr(comfy.supported_models, family), {**SMALL, **config})
    (edit,) = integrated(model).model_options["transformer_options"][KEY]
    gain = edit.gain_at(Chunk(slice(0, 1), "positive", True, {}, (latent, latent)))
    shares = [[share_outside(places, gain) for places in each] for each in (finer, coarser)]
    assert [sum(each) / len(each) for each in shares] == pytest.approx([0.417, 0.051], abs=0.055)
    assert min(shares[1]) < 0.11
    # The authors' number alone would not, where no layer has few places.
    if family == "SDXL":
        assert min(share_outside(places, 500) for places in (*finer, *coarser)) > 0.35


def test_lambda_is_the_weight_of_the_auxiliary_branch() -> None:
    concept, auxiliary = torch.rand(2, 3, 8, 64, generator=generator(2)).mul(4).unbind()
    weights = [concept_weight(concept, auxiliary, value) for value in (-2.0, 0.0, 1.0, 2.0)]
    assert all(bool((more < less).all()) for less, more in itertools.pairwise(weights))
    assert bool((weights[1] > 0.5).all())
    torch.testing.assert_close(weights[2], torch.stack([concept, auxiliary]).softmax(0)[0])


def test_a_run_without_the_concepts_prompt() -> None:
    tokens = BranchTokens(((1, 6),), ((2, 4),))
    edit = DualBranchIntegration(frozenset(), BranchWindow(), tokens, tokens, None)
    edit.check([{}, {BRANCH_KEY: tokens}])
    for prompts in ([], [{}], [{BRANCH_KEY: BranchTokens(((1, 5),), ((2, 4),))}]):
        with pytest.raises(ValueError, match="not the concept conditioning of Dual-Branch Integration; connect the"):
            edit.check(prompts)
