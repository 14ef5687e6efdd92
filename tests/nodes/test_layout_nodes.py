"""The Layout node and what Layout Bias takes in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_extras.nodes_bounding_boxes import CreateBoundingBoxes
from subject_patches.nodes.layout import LayoutBiasNode, LayoutNode
from subject_patches.patches.mechanisms.layout_regions import Layout, Region, layout_picture
from subject_patches.tests.shared.layouts import box
from subject_patches.tests.shared.models import laid_out, small_model
from torch import Tensor

CANVAS = (96, 64)


def rectangle(x: float, y: float, width: float, height: float, **more: Any) -> dict[str, Any]:
    return {"x": x, "y": y, "width": width, "height": height, **more}


def laid(*canvas: int, **inputs: Any) -> Layout:
    return LayoutNode.execute(*(canvas or CANVAS), **inputs).args[0]


def assert_regions(layout: Layout, expected: list[tuple[str, Tensor]]) -> None:
    assert [region.phrase for region in layout.regions] == [phrase for phrase, _ in expected]
    for region, (_, mask) in zip(layout.regions, expected, strict=True):
        assert torch.equal(region.mask, mask)


DOG, HAT = rectangle(8, 4, 40, 50), rectangle(30, 0, 30, 20)
MASKS = [box(*CANVAS, 8, 4, 48, 54), box(*CANVAS, 30, 0, 60, 20)]


@pytest.mark.parametrize(
    ("boxes", "phrases"),
    [
        ([DOG, HAT], "dog\nhat"),
        ([[DOG, HAT]], "dog; hat"),
        ([{**DOG, "metadata": {"desc": "dog"}}, {**HAT, "label": "hat"}], ""),
        ([{**DOG, "metadata": {"desc": " dog "}}, {**HAT, "metadata": {}}], "hat"),
        ([{**DOG, "label": "person"}, {**HAT, "label": "thing"}], "dog\nhat"),
        ([{"bbox": [62.5, 83.4, 843.8, 500], "desc": "dog"}, {"bbox": [0, 312, 313, 625], "desc": "hat"}], ""),
    ],
    ids=["lines", "a batch of one", "descriptions and labels", "a line for the rest", "lines go before", "elements"],
)
def test_boxes_and_their_phrases(boxes: Any, phrases: str) -> None:
    assert_regions(laid(boxes=boxes, phrases=phrases), list(zip(("dog", "hat"), MASKS, strict=True)))


def test_what_the_hosts_editor_gives() -> None:
    state = [{**DOG, "metadata": {"desc": "dog"}}, {**HAT, "metadata": {"desc": "hat"}}]
    _, boxes, elements = CreateBoundingBoxes.execute(*CANVAS, editor_state=state).args
    assert_regions(laid(boxes=boxes, phrases="dog\nhat"), list(zip(("dog", "hat"), MASKS, strict=True)))
    assert_regions(laid(boxes=elements), list(zip(("dog", "hat"), MASKS, strict=True)))
    assert laid(boxes=CreateBoundingBoxes.execute(*CANVAS).args[1]).regions == ()


def test_one_box_is_cut_at_the_canvas_and_never_lost() -> None:
    cut = laid(boxes=rectangle(-10, 50, 30, 30), phrases="dog")
    assert_regions(cut, [("dog", box(*CANVAS, 0, 50, 20, 64))])
    thin = laid(boxes=rectangle(10.2, 20.2, 0.1, 5), phrases="dog")
    assert_regions(thin, [("dog", box(*CANVAS, 10, 20, 11, 25))])


def test_masks_of_any_size_and_chains() -> None:
    half = torch.zeros(2, 16, 24)
    half[0, :, :12], half[1, 8:] = 1, 0.6
    masked = laid(mask=half, phrases="sea\nsand")
    left, below = box(*CANVAS, 0, 0, 48, 64), box(*CANVAS, 0, 32, 96, 64)
    assert_regions(masked, [("sea", left), ("sand", below)])
    big = torch.zeros(640, 960)
    big[5, 955] = 1
    assert_regions(laid(mask=big, phrases="dot"), [("dot", box(*CANVAS, 95, 0, 96, 1))])
    chain = laid(boxes=[{**DOG, "label": "dog"}], mask=half[:1], phrases="sea", others=masked)
    assert_regions(chain, [("sea", left), ("sand", below), ("dog", MASKS[0]), ("sea", left)])
    assert torch.equal(chain.shown()["sea"], left)


def test_the_picture_shows_each_phrase_in_a_colour_of_its_own() -> None:
    regions = (Region("dog", MASKS[0]), Region("hat", MASKS[1]), Region("Dog", box(*CANVAS, 70, 40, 96, 64)))
    picture = LayoutNode.execute(*CANVAS, others=Layout(*CANVAS, regions)).args[1]
    assert picture.shape == (1, 64, 96, 3)
    dog, again, hat, both, nothing = (picture[0, y, x] for x, y in ((10, 50), (72, 62), (58, 2), (32, 6), (2, 2)))
    assert torch.equal(dog, again)
    torch.testing.assert_close(both, (dog + hat) / 2, rtol=0, atol=1 / 255)
    colours = [tuple(colour.tolist()) for colour in (dog, hat, both, nothing)]
    assert len(set(colours)) == 4
    bare = layout_picture(Layout(*CANVAS))
    assert len(bare.flatten(0, 2).unique(dim=0)) == 1


@pytest.mark.parametrize("canvas", [(4, 64), (96, 20000)])
def test_a_canvas_out_of_bounds(canvas: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"The (width is 4|height is 20000); give a number from 8 to 16384\."):
        laid(*canvas, boxes=[DOG], phrases="dog")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "The layout is empty: connect boxes"),
        ({"boxes": [rectangle(100, 4, 20, 20)], "phrases": "dog"}, r"Box 1 \('dog'\) .* outside the canvas of 96 x 64"),
        ({"boxes": [DOG, rectangle(4, -20, 20, 20)], "phrases": "dog;hat"}, r"Box 2 \('hat'\) .* outside the canvas"),
        ({"boxes": [rectangle(4, 4, 0, 20)], "phrases": "dog"}, r"Box 1 \('dog'\) is 0 wide and 20 high"),
        ({"boxes": [rectangle(4, 4, 5, float("nan"))], "phrases": "dog"}, r"Box 1 \('dog'\) is 5 wide and nan high"),
        ({"boxes": [{"x": 1}], "phrases": "dog"}, "Box 1 is .* needs the numbers x, y, width and height"),
        ({"boxes": [{"bbox": [1, 2, 3]}], "phrases": "dog"}, "Box 1 is .* an element a bbox of four"),
        ({"boxes": "dog"}, "The boxes are a str; connect bounding boxes"),
        ({"boxes": [[DOG], [HAT]], "phrases": "dog"}, "those of 2 pictures; a layout takes the boxes of one"),
        ({"boxes": [DOG, HAT], "phrases": "dog"}, "2 boxes and 0 masks, 2 of them without .* but 1 phrases"),
        ({"boxes": [DOG], "phrases": ""}, "1 boxes and 0 masks, 1 of them without .* but 0 phrases"),
        (
            {"mask": torch.zeros(1, 8, 8), "phrases": "dog"},
            r"Mask 1 \('dog'\) is empty: no place of its 8 x 8",
        ),
        ({"others": Layout(64, 64)}, "The canvas is 96 x 64 but that of the layout in 'others' is 64 x 64"),
    ],
)
def test_a_layout_that_cannot_be(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        laid(**inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"guidance_weight": -0.1}, "The guidance_weight is -0.1; give a number from 0 to 10"),
        ({"positive_weight": float("nan")}, "The positive_weight is nan"),
        ({"negative_weight": 1.0}, "The negative_weight is 1.0; give a number from -1000 to 0"),
        ({"weaken": "nowhere"}, "weaken is 'nowhere'; choose one of everywhere outside, other regions"),
        ({"eta": "none"}, "eta is 'none'; choose one of fading, constant"),
        ({"statistics": "none"}, "statistics are 'none'"),
        ({"sites": "named"}, "none is named"),
        ({"sites": "named", "named_sites": "output.99"}, "'output.99' names no cross-attention"),
        ({"start_percent": 0.6, "end_percent": 0.4}, "swap the two"),
    ],
)
def test_a_bias_that_cannot_be(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        laid_out(small_model(), Layout(8, 8, (Region("dog", torch.ones(8, 8, dtype=torch.bool)),)), **inputs)


def test_defaults_are_the_authors() -> None:
    defaults = {each.id: each.default for each in LayoutBiasNode.GET_SCHEMA().inputs if hasattr(each, "default")}
    assert (defaults["guidance_weight"], defaults["positive_weight"], defaults["hard_mask"]) == (0.08, 2.5, True)
    assert (defaults["eta"], defaults["weaken"], defaults["sites"]) == (
        "fading",
        "everywhere outside",
        "usual",
    )
