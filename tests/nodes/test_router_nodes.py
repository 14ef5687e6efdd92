"""Route Subjects by Masks and by Attention: what they take, and bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from subject_patches.nodes.router import RouteByMasksNode
from subject_patches.patches.mechanisms.layout_regions import Layout, Region
from subject_patches.tests.shared.layouts import box
from subject_patches.tests.shared.models import map_router, masks, routed, sample, subject

# Bad input

LAYOUT = Layout(40, 20, (Region("cat", box(40, 20, 0, 0, 15, 20)), Region("dog", box(40, 20, 20, 0, 40, 20))))


def by_masks(**values: Any) -> Any:
    return RouteByMasksNode.execute(**values).args[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "are made of masks or a layout, and neither is connected; connect one of them"),
        ({"masks": masks(2), "layout": LAYOUT}, "masks or a layout, and both are connected"),
        ({"masks": torch.zeros(2, 8, 8)}, "Mask 1 covers nothing: no place of its 8 x 8 is above one half; paint"),
        ({"masks": torch.ones(2, 4, 8)}, "Mask 1 and mask 2 overlap in 32 pixels; every place belongs to one subject"),
        ({"masks": masks(9)}, "There are 9 regions for subjects; a router takes 1 to 8"),
        ({"layout": Layout(40, 20)}, "There are 0 regions for subjects"),
        (
            {"layout": Layout(40, 20, (*LAYOUT.regions, Region("Bird", box(40, 20, 10, 0, 18, 2))))},
            "The layout's region of 'cat' and the layout's region of 'bird' overlap in 10 pixels",
        ),
    ],
)
def test_masks_that_are_no_routes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_masks(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": 1.5}, r"The threshold is 1\.5; give a number from 0 to 1\."),
        ({"threshold": math.nan}, "The threshold is nan"),
        ({"smoothing": -0.1}, r"The smoothing is -0\.1; give a number from 0 to 0\.5"),
        ({"maps": "all"}, "maps are 'all'; choose one of preceding layer, running mean"),
    ],
)
def test_settings_of_a_router(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        map_router(**values)


def test_a_router_for_another_number_of_subjects(model: Any) -> None:
    with pytest.raises(ValueError, match="regions for 2 subjects but there are 1; give as many of the one as of the"):
        routed(model, (subject(),), by_masks(masks=masks(2)))


def test_a_layout_without_the_subjects_phrase(model: Any) -> None:
    with pytest.raises(ValueError, match="no region for the subject 'bird' alone; its phrases are cat, dog: give"):
        routed(model, (subject(phrase="cat"), subject(phrase="bird")), by_masks(layout=LAYOUT))


def test_a_layouts_regions_go_to_the_subjects_of_their_phrases(model: Any) -> None:
    one, two = subject(seed=1, phrase="Dog"), subject(seed=2, phrase="cat")
    own = torch.stack([region.mask for region in LAYOUT.regions]).flip(0).float()
    by_layout = sample(routed(model, (one, two), by_masks(layout=LAYOUT)))
    assert torch.equal(by_layout, sample(routed(model, (one, two), by_masks(masks=own))))


def test_a_subject_without_a_phrase_for_maps(model: Any) -> None:
    with pytest.raises(ValueError, match="Subject 2 has no phrase, so its attention map cannot be found; give its"):
        routed(model, (subject(), subject(phrase="")), map_router())


@pytest.mark.parametrize(
    ("phrases", "message"),
    [
        (("subject", "dog"), "does not say which of its words are 'dog', so this subject's attention map cannot be fo"),
        (("scene", "scene"), "2 subjects have the phrase 'scene', which the positive prompt does not say that often"),
    ],
)
def test_a_phrase_without_tokens_in_the_prompt(phrases: tuple[str, str], message: str, model: Any) -> None:
    patched = routed(model, tuple(subject(phrase=phrase) for phrase in phrases), map_router())
    with pytest.raises(ValueError, match=message):
        sample(patched)
