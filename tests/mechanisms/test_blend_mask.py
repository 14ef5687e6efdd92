"""Adaptive Swap Mask: its equations, its preview, and bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import ndimage
from subject_patches.nodes.retouch import AdaptiveBlendMaskNode
from subject_patches.patches.mechanisms.blend_mask import (
    AdaptiveMask,
    MaskInRun,
    distance_weight,
    thresholded,
    united,
    without_small,
)
from subject_patches.tests.shared.layouts import box
from subject_patches.tests.shared.models import generator
from torch import Tensor


def test_thresholded_attention() -> None:
    attention = torch.tensor([[1.0, 2.0], [4.0, 5.0]])
    assert thresholded(attention, 0.75).tolist() == [[False, False], [True, True]]
    assert thresholded(attention, 0.76).tolist() == [[False, False], [False, True]]
    assert not thresholded(torch.full((2, 2), 0.3), 0.3).any()


def test_or_and_and() -> None:
    attended, segmented = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    assert united(attended, segmented, False).tolist() == [True, True, True, False]
    assert united(attended, segmented, True).tolist() == [True, False, False, False]


def test_distance_weight() -> None:
    """By hand: the Euclidean distance to the nearest place outside, over the largest one, brought to 0.5 to 1."""
    inside = box(12, 9, 1, 2, 10, 7)
    inside[4, 8:] = False
    right = torch.zeros(inside.shape)
    outside = (~inside).nonzero().float()
    for y, x in inside.nonzero().tolist():
        right[y, x] = (outside - torch.tensor([float(y), float(x)])).norm(dim=1).min()
    right = torch.where(inside, 0.5 + 0.5 * right / right.max(), 0.0)
    torch.testing.assert_close(distance_weight(inside), right)
    assert distance_weight(torch.ones(3, 4, dtype=torch.bool)).eq(1).all()
    assert distance_weight(torch.zeros(3, 4, dtype=torch.bool)).eq(0).all()


def test_small_components_go() -> None:
    mask = box(10, 10, 0, 0, 3, 3).float() + box(10, 10, 5, 5, 6, 7).float()
    # Touching at a corner is touching.
    mask[7, 6] = 1
    assert without_small(mask > 0, 0.03).equal(mask > 0)
    assert without_small(mask > 0, 0.04).equal(box(10, 10, 0, 0, 3, 3))
    assert not without_small(mask > 0, 0.1).any()


def test_the_mask_is_the_papers_sum() -> None:
    """M = Normalize(D(M^k)) + C(M^c), clamped, at twice the latents' size; with AND, nothing outside of the mask."""
    attention = torch.rand(2, 6, 8, generator=generator(3))
    segmented = box(50, 33, 11, 5, 40, 22).float()[None]
    for both in (False, True):
        stages = AdaptiveMask(segmented, "subject", 0.6, 0.05, both).stages((6, 8), attention)
        shape = torch.nn.functional.adaptive_avg_pool2d(segmented, (12, 16))[0] >= 0.5
        for row in (0, 1):
            low, high = attention[row].min(), attention[row].max()
            attended = (attention[row] - low) / (high - low) >= 0.6
            finer = attended.repeat_interleave(2, 0).repeat_interleave(2, 1)
            subject = finer & shape if both else finer | shape
            far = torch.from_numpy(ndimage.distance_transform_edt(subject.numpy())).float()
            weight = torch.where(subject, 0.5 + 0.5 * far / far.max(), torch.tensor(0.0))
            labels, count = ndimage.label(attended.numpy(), structure=[[1] * 3] * 3)
            kept = sum((labels == n for n in range(1, count + 1) if (labels == n).sum() >= 0.05 * 48), labels * 0)
            sure = torch.from_numpy(kept).repeat_interleave(2, 0).repeat_interleave(2, 1)
            sure = sure * shape if both else sure
            torch.testing.assert_close(stages.blend[row], (weight + sure).clamp(max=1).float())
            assert stages.subject[row].bool().equal(subject)
            assert bool((stages.blend[row] > 0)[~shape].any()) != both


def test_only_earlier_levels_decide() -> None:
    run = MaskInRun(AdaptiveMask(None, "subject"))
    first, second = (torch.rand(1, 4, 4, generator=generator(n)) for n in (1, 2))
    run.add(9.0, first)
    assert run.stages(9.0, (4, 4)) is None
    run.add(4.0, second)
    assert torch.equal(run.stages(4.0, (4, 4)).attention, first)
    assert torch.equal(run.stages(1.0, (4, 4)).attention, first + second)


def blend_mask(**values: Any) -> Any:
    return AdaptiveBlendMaskNode.execute(**values).args


def test_masks_of_any_size_and_their_preview() -> None:
    segmented = box(30, 20, 6, 4, 22, 15).float()[None]
    made, preview = blend_mask(mask=segmented)
    assert preview.shape == (1, 20, 60, 3)
    assert preview[0, :, :30, 0].equal(segmented[0])
    torch.testing.assert_close(preview[0, :, 30:, 0], distance_weight(segmented[0] > 0))
    stages = made.stages((8, 8))
    assert stages.blend.shape == (1, 16, 16)
    assert 0.5 <= stages.blend.max() <= 1
    assert blend_mask(phrase=" subject ")[0].phrase == "subject"


@pytest.mark.parametrize(("join", "both"), [("OR", False), ("AND", True)])
def test_choices_reach_the_mask(join: str, both: bool) -> None:
    made = blend_mask(mask=torch.ones(1, 8, 9), threshold=0.6, smallest_component=0.05, join=join)[0]
    assert (made.threshold, made.smallest, made.both) == (0.6, 0.05, both)


@pytest.mark.parametrize("mask", [torch.zeros(1, 8, 9), torch.full((8, 9), 0.4), torch.stack([torch.zeros(8, 9)] * 2)])
def test_an_empty_mask(mask: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"Mask 1 of \d is empty: no place of its 9 x 8 is above one half\. Segment the"
    ):
        blend_mask(mask=mask)


def test_other_bad_input_of_the_mask() -> None:
    with pytest.raises(
        ValueError, match="nothing to make a blend mask of; connect a mask, or write the subject's phrase"
    ):
        blend_mask()
    for name, value, least in (
        ("threshold", 0.0, "0.01"),
        ("threshold", math.nan, "0.01"),
        ("smallest_component", 1.5, "0"),
    ):
        with pytest.raises(ValueError, match=rf"The {name} is {value}; give a number from {least} to 1"):
            blend_mask(phrase="dog", **{name: value})
    with pytest.raises(ValueError, match="join is 'XOR'; choose one of OR, AND"):
        blend_mask(phrase="dog", join="XOR")
