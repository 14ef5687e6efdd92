"""Align Reference to Layout: where a reference's subject comes to stand, and what stands around it."""

from __future__ import annotations

import pytest
import torch
from subject_patches.nodes.align import AlignReferenceNode
from subject_patches.patches.mechanisms.aligned import Box, aligned, scale_of, without_background
from subject_patches.patches.mechanisms.subject import mask_bounds
from subject_patches.tests.shared.layouts import box
from subject_patches.tests.shared.models import generator
from torch import Tensor


def picture(height: int, width: int) -> Tensor:
    return torch.rand(1, height, width, 3, generator=generator(1))


def masked(height: int, width: int, y0: int, x0: int, y1: int, x1: int) -> Tensor:
    """A mask (1, height, width) that is white in a box."""
    mask = torch.zeros(1, height, width)
    mask[:, y0:y1, x0:x1] = 1
    return mask


def test_how_large_a_subject_becomes() -> None:
    subject, place = Box(0, 0, 10, 40), Box(5, 5, 25, 45)
    assert scale_of(subject, place, within=True) == 1
    assert scale_of(subject, place, within=False) == pytest.approx(2**0.5)


def test_moved_without_scaling_it_is_the_same_picture() -> None:
    image, mask = picture(24, 40), masked(24, 40, 4, 6, 12, 16)
    out, moved = aligned(image, mask, Box(6, 4, 16, 12), Box(26, 10, 36, 18), (24, 40))
    assert torch.allclose(out[:, 6:, 20:], image[:, :18, :20], atol=1e-6)
    assert torch.equal(moved, masked(24, 40, 10, 26, 18, 36))
    # Beyond its edge the picture goes on as the edge is.
    assert torch.allclose(out[:, :6, 20:], image[:, :1, :20].expand(-1, 6, -1, -1), atol=1e-6)
    assert torch.allclose(out[:, 6:, :20], image[:, :18, :1].expand(-1, -1, 20, -1), atol=1e-6)


@pytest.mark.parametrize("size", [(64, 96), (96, 48), (40, 40)])
def test_the_subject_stands_where_the_layouts_does(size: tuple[int, int]) -> None:
    mask = masked(50, 30, 20, 10, 30, 20)
    place = masked(*size, 8, 4, 32, 28)
    image, moved = AlignReferenceNode.execute(picture(50, 30), mask, place).args
    assert image.shape[1:3] == moved.shape[1:] == size
    # Bicubic steps are half a pixel wide at most where a mask is cut at one half.
    assert all(abs(a - b) <= 1 for a, b in zip(mask_bounds(moved[0], 0.0), (4, 8, 28, 32), strict=True))


def test_without_a_layout_the_subject_fills_its_picture() -> None:
    mask = masked(40, 60, 10, 10, 20, 20)
    image, moved = AlignReferenceNode.execute(picture(40, 60), mask, margin=0.1).args
    assert image.shape == (1, 40, 60, 3)
    x0, y0, x1, y1 = mask_bounds(moved[0], 0.0)
    assert abs(y0 - 4) <= 1
    assert abs(y1 - 36) <= 1
    assert abs((x0 + x1) / 2 - 30) <= 1


@pytest.mark.parametrize("subject", [(3, 5, 9, 15), (30, 40, 48, 52), (0, 0, 50, 60)])
def test_enlarged_it_is_a_part_of_the_whole_picture_enlarged(subject: tuple[int, int, int, int]) -> None:
    """Of a subject near the edge, in the middle, and of nearly all."""
    image, mask, size, place = picture(60, 70), masked(60, 70, *subject), (80, 96), Box(20, 12, 80, 75)
    y0, x0, y1, x1 = subject
    box = Box(x0, y0, x1, y1)
    scale = scale_of(box, place, within=False)
    height, width = round(60 * scale), round(70 * scale)
    planes = torch.cat([image.movedim(-1, 1), mask[:, None]], 1)
    whole = torch.nn.functional.interpolate(planes, (height, width), mode="bicubic").clamp(0, 1)[0]
    top = round((place.y0 + place.y1 - (y0 + y1) * height / 60) / 2)
    left = round((place.x0 + place.x1 - (x0 + x1) * width / 70) / 2)
    rows, columns = torch.arange(size[0]) - top, torch.arange(size[1]) - left
    expected = whole[:, rows.clamp(0, height - 1)][..., columns.clamp(0, width - 1)]
    out, moved = aligned(image, mask, box, place, size)
    assert torch.allclose(out[0].movedim(-1, 0), expected[:3], atol=1e-4)
    known = ((rows >= 0) & (rows < height))[:, None] & (columns >= 0) & (columns < width)
    assert torch.allclose(moved[0], expected[3] * known, atol=1e-4)


def test_a_small_subject_in_a_large_picture_takes_no_more_than_the_canvas() -> None:
    """What is allocated goes with what is seen, not with the whole picture as large."""
    image, mask = picture(300, 400), masked(300, 400, 100, 120, 104, 124)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as seen:
        aligned(image, mask, Box(120, 100, 124, 104), Box(40, 40, 440, 440), (480, 480))
    largest = max(event.cpu_memory_usage for event in seen.events())
    # Enlarged a hundred times, the whole would be 19 GB.
    assert largest < 2**26


@pytest.mark.parametrize(("background", "shade"), [("white", 1.0), ("gray", 0.5)])
def test_what_stands_around_it(background: str, shade: float) -> None:
    mask = masked(32, 32, 8, 8, 24, 24)
    image, moved = AlignReferenceNode.execute(picture(32, 32), mask, mask, background).args
    assert torch.allclose(image[0][moved[0] == 0], torch.tensor(shade), atol=1e-5)
    assert torch.allclose(image[0][moved[0] == 1], picture(32, 32)[0][mask[0] == 1], atol=1e-5)
    soft = without_background(picture(4, 4), torch.full((1, 4, 4), 0.25), shade)
    assert torch.allclose(soft, 0.25 * picture(4, 4) + 0.75 * shade)


def test_one_reference_for_several_layouts() -> None:
    places = torch.cat([masked(32, 32, 2, 2, 10, 10), masked(32, 32, 14, 14, 30, 30)])
    image, moved = AlignReferenceNode.execute(picture(32, 32), masked(32, 32, 8, 8, 24, 24), places).args
    assert image.shape == (2, 32, 32, 3)
    assert [int(each.sum()) for each in moved] == pytest.approx([64, 256], rel=0.15)
    alone = AlignReferenceNode.execute(picture(32, 32), masked(32, 32, 8, 8, 24, 24), places[1:]).args[0]
    assert torch.equal(image[1:], alone)


def test_bad_input() -> None:
    image, mask = picture(32, 32), masked(32, 32, 8, 8, 24, 24)
    three, two = image.expand(3, -1, -1, -1), mask.expand(2, -1, -1)
    with pytest.raises(ValueError, match="There are 2 masks for 3 pictures; give one for all, or one for each"):
        AlignReferenceNode.execute(three, two)
    with pytest.raises(ValueError, match="There are 2 layout masks for 3 pictures; give one"):
        AlignReferenceNode.execute(three, mask, two)
    with pytest.raises(ValueError, match="There are 2 pictures for 3 layout masks; give one"):
        AlignReferenceNode.execute(three[:2], mask, mask.expand(3, -1, -1))
    with pytest.raises(ValueError, match="background is 'blue'; choose one of keep, white, gray"):
        AlignReferenceNode.execute(image, mask, background="blue")
    with pytest.raises(ValueError, match="mask is empty: no place of its 32 x 32"):
        AlignReferenceNode.execute(image, mask, torch.zeros(1, 32, 32))
    # A mask of another size than its picture's is brought to it.
    found = AlignReferenceNode.execute(image, box(16, 16, 4, 4, 12, 12).float()[None], mask).args
    assert torch.equal(found[1], AlignReferenceNode.execute(image, mask, mask).args[1])
