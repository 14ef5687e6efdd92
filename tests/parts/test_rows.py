"""Which of several pictures or masks goes with which picture of a batch: by the host's rule, or by what a latent is."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import pytest
import torch
from comfy.utils import repeat_to_batch_size
from subject_patches.nodes.trajectory import InvertToTrajectoryNode
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.mechanisms.blend_mask import AdaptiveMask
from subject_patches.patches.mechanisms.inversion import Inversion
from subject_patches.patches.parts.rows import in_turn, matching_rows
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared.look import Look
from subject_patches.tests.shared.models import (
    difference,
    known_prompt,
    levels,
    prompt,
    randn,
    recycled,
    sample,
    swapped,
    trajectory,
)
from torch import Tensor

from nodes import LatentFromBatch, RepeatLatentBatch

ROUNDING = 2e-5
SIZE = (8, 10)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", [3, 4])
def test_repeats_are_the_hosts(count: int, rows: int) -> None:
    tensor = randn(count, 2, 3)
    assert torch.equal(in_turn(tensor, rows), repeat_to_batch_size(tensor, rows))


def test_latents_are_known_again() -> None:
    known = (randn(3, 4, 2, 2), randn(3, 4, 2, 2, seed=1))
    assert matching_rows(known, known[0][[2, 0]]) == [2, 0]
    assert matching_rows(known, known[1][1:2] * (1 + 1e-5)) == [1]
    assert matching_rows(known, torch.cat([known[0][:1], known[0][:1] + 1])) is None
    assert matching_rows(known, known[0][..., :1]) is None
    assert matching_rows((torch.zeros(2, 4, 2, 2),), torch.zeros(1, 4, 2, 2)) is None


# Trajectories


def inverted(model: Any, size: tuple[int, int] = SIZE, seed: int = 0) -> tuple[Inversion, dict[str, Tensor]]:
    """Two pictures on their ways, and their last latents."""
    with torch.inference_mode():
        made = InvertToTrajectoryNode.execute(
            model, {"samples": randn(2, 4, *size, seed=seed)}, levels(model, 3), conditioning=prompt(1)
        ).args
    return made[0], made[1]


def one_of(path: Inversion, row: int) -> Inversion:
    return Inversion(path.sigmas, path.states[:, row : row + 1], path.family)


def from_last(patched: Any, latent: dict[str, Tensor]) -> Tensor:
    """SamplerCustom with DisableNoise."""
    samples = latent["samples"]
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            patched, torch.zeros_like(samples), 3.0, comfy.samplers.sampler_object("euler"), levels(patched, 3),
            known_prompt(), prompt(2), samples, disable_pbar=True, seed=0,
        )  # fmt: skip


@pytest.mark.parametrize("mask", [None, AdaptiveMask(None, "subject")], ids=["whole", "blended"])
def test_a_latent_taken_out_of_a_batch_keeps_its_own_picture(mask: Any, model: Any) -> None:
    path, last = inverted(model)
    references, _ = inverted(model, (5, 6), 3)
    given = {"lambda2": 0.5, "mask_blend_start": 0.6, "blend_mask": mask}
    both = swapped(model, path, references, **given)
    together = from_last(both, last)
    for row in (0, 1):
        (taken,) = LatentFromBatch().frombatch(last, row, 1)
        alone = from_last(both, taken)
        # As a trajectory of that picture alone would.
        right = from_last(swapped(model, one_of(path, row), one_of(references, row), **given), taken)
        assert difference(alone, right) < ROUNDING
        assert difference(alone, together[row : row + 1]) < ROUNDING
    # And repeated, as the host repeats a batch.
    (twice,) = RepeatLatentBatch().repeat(last, 2)
    repeated = from_last(both, twice)
    assert difference(repeated, torch.cat([together, together])) < ROUNDING
    turned = {**last, "samples": last["samples"].flip(0)}
    assert difference(from_last(both, turned), together.flip(0)) < ROUNDING


def test_too_many_pictures_for_a_batch_are_refused(model: Any) -> None:
    """Of which none is what sampling starts from."""
    path = trajectory(randn(2, 4, *SIZE))
    for name, values in (("layout", {"layout": path}), ("reference", {"reference": path})):
        with pytest.raises(
            ValueError, match=rf"There are 2 pictures in the {name} trajectory but 1 picture is sampled; give one for"
        ):
            sample(swapped(model, **values), size=SIZE)


# Masks


def test_masks_go_in_turn(model: Any) -> None:
    masks = torch.zeros(2, *SIZE)
    masks[0, :, :5], masks[1, :, 5:] = 1, 1
    patched = [recycled(model, region_mask=mask) for mask in (masks, masks[:1], masks[1:])]
    given, first, second = (sample(each, batch=4, size=SIZE) for each in patched)
    assert difference(given[[0, 2]], first[[0, 2]]) < ROUNDING
    assert difference(given[[1, 3]], second[[1, 3]]) < ROUNDING


@pytest.mark.parametrize("what", ["region masks", "blend masks", "adaptive blend masks"])
def test_too_many_masks_for_a_batch_are_refused(what: str, model: Any) -> None:
    masks = torch.ones(3, *SIZE)
    if what == "region masks":
        patched = recycled(model, region_mask=masks)
    else:
        mask = AdaptiveMask(masks, "") if what == "adaptive blend masks" else masks
        patched = swapped(model, trajectory(randn(1, 4, *SIZE)), blend_mask=mask)
    with pytest.raises(ValueError, match=rf"There are 3 {what.removeprefix('adaptive ')} but 2 pictures are sampled"):
        sample(patched, batch=2, size=SIZE)


# What a trajectory must reach


@pytest.mark.parametrize("name", ["layout", "reference"])
def test_a_trajectory_that_begins_too_low_ends_a_run_before_its_first_step(name: str, model: Any) -> None:
    path = trajectory(randn(1, 4, *SIZE))
    low = Inversion(path.sigmas[1:], path.states[1:], path.family)
    look = Look(frozenset(), Window())
    given = {name: low, "lambda2": 0.5}
    seen: list[int] = []
    # The layout is needed at once; the reference in a window that begins with the schedule.
    values = given if name == "layout" else {**given, "lambda2": 0.0}
    patched = add_edit(swapped(model, **values), look)
    with pytest.raises(ValueError, match=rf"The {name} trajectory runs from sigma 5 to 0 but is needed at \d"):
        sample(patched, size=SIZE, callback=lambda step, *_: seen.append(step))
    assert not seen
    # Where it is not needed above its begin, it is enough.
    assert sample(swapped(model, **{**given, "start_percent": 0.5}), size=SIZE, steps=4).isfinite().all()


def test_a_sampler_does_not_write_into_the_levels_it_is_given(model: Any) -> None:
    """The host's uni_pc does, and its cache keeps SIGMAS for the next run."""
    given = levels(model, 3)
    kept = given.clone()
    noise = randn(1, 4, *SIZE)
    with torch.inference_mode():
        comfy.sample.sample_custom(
            recycled(model), noise, 3.0, comfy.samplers.sampler_object("uni_pc"), given, known_prompt(), prompt(2),
            torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip
    assert torch.equal(given, kept)
