"""The effects that the README claims, on the trained toy, against the unpatched model in the same run.

A few pairs only: `tools/effects.py` measures a hundred and more, and docs/EFFECTS.md has its numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from host import Host
from measuring.given import Given
from measuring.layout import UNPATCHED, Case
from measuring.recycled_attention import Pair
from measuring.routed_reference import ALONE, UNMOVED, WAYS
from measuring.routed_reference import Case as Scene
from subject_patches.toy.judge import load_judge
from subject_patches.toy.sampling import DIT_CHECKPOINT, Toy
from subject_patches.toy.scenes import SMALL, WHOLE

PAIRS = 16
LAYOUTS = 8
SCENES = 6
LAYOUT_ROWS: dict[str, dict[str, Any] | None] = {UNPATCHED: None, "layout bias": {}}
STEPS = 12


@pytest.fixture(scope="module")
def given(host: Host) -> Iterator[Given]:
    """The toy and its judge; inference mode, as in the host's server."""
    toy, judge = Toy.load(), load_judge()
    with torch.inference_mode():
        yield Given(host, toy, judge, PAIRS, STEPS, WHOLE)


@pytest.fixture(scope="module")
def dit(host: Host) -> Iterator[Given]:
    """The second toy, a transformer."""
    toy, judge = Toy.load(DIT_CHECKPOINT), load_judge()
    with torch.inference_mode():
        yield Given(host, toy, judge, PAIRS, 8, SMALL)


@pytest.fixture(scope="module")
def pairs(given: Given) -> list[Pair]:
    """Emblems, each with its reference picture and a scene to put it in."""
    return [Pair(given, 1000 + number) for number in range(PAIRS)]


def test_recycled_attention_carries_identity(pairs: list[Pair]) -> None:
    """With the reference, the emblem in the picture is more like it than without, by more than chance."""
    rise = [pair.carried({}).identity - pair.carried(None).identity for pair in pairs]
    assert np.mean(rise) > 2 * np.std(rise, ddof=1) / PAIRS**0.5


def test_recycled_attention_carries_identity_in_a_transformer(dit: Given) -> None:
    """On the second toy too, in all its layers at once, in the places where the reference's keys stand by default."""
    pairs = [Pair(dit, 1000 + number) for number in range(6)]
    rise = [pair.carried({}).identity - pair.carried(None).identity for pair in pairs]
    assert np.mean(rise) > 2 * np.std(rise, ddof=1) / len(rise) ** 0.5
    assert np.mean(rise) > 0.1


def test_recycled_attention_keeps_the_rest_of_a_region(pairs: list[Pair]) -> None:
    """In a painted region the reference changes the picture, and what lies outside stays as the scene has it."""
    before, after = ([pair.placed(name) for pair in pairs[:5]] for name in ("unpatched", "decoder, in the region"))
    assert all(b.identity != a.identity for a, b in zip(before, after, strict=True))
    assert max(score.outside or 0 for score in after) < 2


@pytest.mark.parametrize(("which", "layouts"), [("given", LAYOUTS), ("dit", 8)])
def test_layout_bias_brings_things_into_their_boxes(request: pytest.FixtureRequest, which: str, layouts: int) -> None:
    """With the layout, what is found overlaps more with the boxes than without, by more than chance; on both toys."""
    cases = [Case(request.getfixturevalue(which), 2, 1000 + number) for number in range(layouts)]
    before, after = (
        [s for case in cases for s in case.scores(name, settings)[0]] for name, settings in LAYOUT_ROWS.items()
    )
    rise = [patched.overlap - plain.overlap for plain, patched in zip(before, after, strict=True)]
    assert np.mean(rise) > 2 * np.std(rise, ddof=1) / len(rise) ** 0.5
    assert sum(score.inside for score in after) > sum(score.inside for score in before)


@pytest.mark.parametrize(("which", "number"), [("given", SCENES), ("dit", 5)])
def test_routed_references_carry_each_emblem_to_its_own_place(
    request: pytest.FixtureRequest, which: str, number: int
) -> None:
    """With routes by masks, what is in each box is more like that box's own emblem than without, by more than
    chance; on both toys."""
    scenes = [Scene(request.getfixturevalue(which), 2, 1000 + each) for each in range(number)]
    before, after = ([s for scene in scenes for s in scene.placed(name)[0]] for name in (ALONE, "and routed by masks"))
    rise = [patched.identity - plain.identity for plain, patched in zip(before, after, strict=True)]
    assert np.mean(rise) > 2 * np.std(rise, ddof=1) / len(rise) ** 0.5


def test_a_transformer_shows_more_of_references_that_lie_where_their_subjects_are(dit: Given) -> None:
    """Than of the same in their own places, by more than chance."""
    scenes = [Scene(dit, 2, 1000 + number) for number in range(6)]
    own, moved = ([s for scene in scenes for s in scene.placed(f"and {way}")[0]] for way in (UNMOVED, WAYS[1]))
    rise = [after.identity - before.identity for before, after in zip(own, moved, strict=True)]
    assert np.mean(rise) > 2 * np.std(rise, ddof=1) / len(rise) ** 0.5
