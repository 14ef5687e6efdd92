"""Packs that call the model on parts of the picture: what is meant for a place stays in its place."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.engine.placing import runs_of, spots_of
from subject_patches.patches.mechanisms.layout_regions import Layout, Region
from subject_patches.patches.parts.sites import Site
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared.look import Look
from subject_patches.tests.shared.mechanisms import MECHANISMS, Mechanism, over_mechanisms
from subject_patches.tests.shared.models import (
    difference,
    laid_out,
    map_router,
    mask_router,
    randn,
    recycled,
    routed,
    sample,
    subject,
    swapped,
    trajectory,
)
from subject_patches.tests.shared.peers import Box, prompt_by_prompt, tiled
from torch import Tensor

SIZE = (10, 14)
# Of one size, as tiling packs have them; they overlap.
BOXES: list[Box] = [(6, 8, 0, 0), (6, 8, 0, 6), (6, 8, 4, 0), (6, 8, 4, 6)]
HERE = frozenset({Site("self", "output", 3, 0), Site("cross", "output", 3, 0)})
ROUNDING = 2e-5
FEW = 0.003
TILINGS: dict[str, Callable[[Any], Any]] = {
    "one by one": lambda model: tiled(model, BOXES),
    "two in a batch": lambda model: tiled(model, BOXES, together=2),
    "two in a batch, prompts first": lambda model: tiled(model, BOXES, together=2, prompts_first=True),
    "rolled": lambda model: tiled(model, BOXES, together=2, roll=5),
}


def windowed(model: Any, dimension: int, length: int, overlap: int, fixed: bool = True) -> Any:
    """The host's node; `fixed` puts the line before a window in front of it."""
    values = (length, overlap, "standard_static", 1, False, "pyramid", dimension, False, "", False, "", fixed)
    return ContextWindowsManualNode.execute(model, *values).args[0]


def checkered(size: tuple[int, int]) -> Tensor:
    """A mask that is different everywhere."""
    return (randn(1, *size, seed=3) > 0).float()


def whole_lines(chunk: Any) -> tuple[list[int], list[int]]:
    if chunk.lines is not None:
        return list(chunk.lines[0]), list(chunk.lines[1])
    height, width, y, x = chunk.area or (*chunk.latent, 0, 0)
    return list(range(y, y + height)), list(range(x, x + width))


WINDOWS: dict[str, Callable[[Any], Any]] = {
    "rows": lambda model: windowed(model, 2, 6, 2),
    "columns": lambda model: windowed(model, 3, 8, 3, fixed=False),
}


# The host's windows along a side take one picture.
@pytest.mark.parametrize(("name", "batch"), [*((n, b) for n in TILINGS for b in (1, 2)), *((n, 1) for n in WINDOWS)])
def test_a_mask_is_where_the_picture_is(name: str, batch: int, model: Any) -> None:
    mask = torch.cat([checkered(SIZE), 1 - checkered(SIZE)])[:batch]
    look = Look(HERE, Window())
    patched = add_edit(recycled(model, region_mask=mask, sites="named", named_sites="output.3"), look)
    sample({**TILINGS, **WINDOWS}[name](patched), size=SIZE, batch=batch, steps=1)
    shown = torch.zeros(batch, *SIZE)
    calls = [seen.call for seen in look.seen if seen.call.extensions]
    assert calls
    for call in calls:
        ys, xs = whole_lines(call.chunk)
        pictures = call.chunk.pictures or tuple(range(batch))
        route = call.extensions[0].route.expand(len(pictures), -1).view(-1, *call.grid)
        assert torch.equal(route, mask[list(pictures)][:, ys][:, :, xs] > 0)
        for picture in pictures:
            shown[picture, torch.tensor(ys)[:, None], torch.tensor(xs)] = 1
    assert shown.all()


def parts_of(model: Any, patched: Any, note: str, **run: Any) -> tuple[Tensor, list[tuple[Any, Tensor]]]:
    """What a mechanism notes at the finest layer, for the whole picture and for its tiles."""
    found = []
    for target in (patched, tiled(patched, BOXES, together=2, roll=5)):
        look = Look(HERE, Window())
        sample(add_edit(target, look), size=SIZE, steps=2, **run)
        notes = [(s.call.chunk, each.maps()) for s in look.seen for each in s.call.notes if each.name == note]
        found.append([(chunk, maps) for chunk, maps in notes if chunk.conditioned])
    (_, whole), *_ = found[0]
    return whole, found[1]


def test_routes_and_layouts_are_where_the_picture_is(model: Any) -> None:
    left = torch.zeros(20, 28, dtype=torch.bool)
    left[:, :12] = True
    layout = Layout(28, 20, (Region("subject", left), Region("scene", ~left)))
    cases = (
        ("routing map", routed(model, (subject(), subject(seed=2, phrase="scene")), mask_router(2))),
        ("layout region", laid_out(model, layout)),
    )
    for note, patched in cases:
        whole, parts = parts_of(model, patched, note)
        assert parts
        for chunk, maps in parts:
            ys, xs = whole_lines(chunk)
            part = whole[:, :, ys][..., xs]
            # A line of the canvas is between two of the latent's.
            assert float((maps - part).abs().mean()) < 0.12, note


def test_routes_by_maps_are_those_of_the_whole_picture(model: Any) -> None:
    patched = routed(model, (subject(), subject(seed=2, phrase="scene")), map_router())
    look = Look(HERE, Window())
    result = sample(tiled(add_edit(patched, look), BOXES, together=4), size=SIZE, steps=2)
    assert result.isfinite().all()
    assert difference(result, sample(tiled(model, BOXES), size=SIZE, steps=2)) > FEW
    routes = [each.maps() for seen in look.seen for each in seen.call.notes if each.name == "routing map"]
    assert routes
    # Tiles of one batch go by one map, so they agree where they overlap.
    for first in range(0, len(routes), len(BOXES)):
        whole = torch.full((2, *SIZE), torch.nan)
        for (height, width, y, x), maps in zip(BOXES, routes[first : first + len(BOXES)], strict=True):
            part = whole[:, y : y + height, x : x + width]
            known = ~part.isnan()
            assert torch.equal(part[known], maps[0][known])
            part.copy_(maps[0])


@over_mechanisms
def test_windows_of_a_batch_are_the_batch(mechanism: Mechanism, model: Any) -> None:
    """The host's windows over pictures that know nothing of each other change nothing."""
    patched = mechanism.on(model)
    assert difference(sample(windowed(patched, 0, 2, 1), batch=3), sample(patched, batch=3)) < ROUNDING


def test_each_picture_has_its_own_in_every_window(model: Any) -> None:
    layouts = trajectory(randn(3, 4, 8, 8, seed=1))
    masks = torch.cat([checkered((8, 8)), 1 - checkered((8, 8)), torch.ones(1, 8, 8)])
    cases = (
        swapped(model, layouts, trajectory(randn(3, 4, 8, 8, seed=2)), lambda2=0.5, blend_mask=masks),
        recycled(model, region_mask=masks),
    )
    for patched in cases:
        apart = sample(windowed(patched, 0, 2, 1), batch=3, steps=3)
        assert difference(apart, sample(patched, batch=3, steps=3)) < ROUNDING


@over_mechanisms
def test_tiles_of_every_mechanism(mechanism: Mechanism, model: Any) -> None:
    run = {"size": SIZE, "batch": 2}
    result = sample(TILINGS["two in a batch"](mechanism.on(model, size=SIZE)), **run)
    assert result.isfinite().all()
    assert difference(result, sample(TILINGS["two in a batch"](model), **run)) > FEW
    apart = sample(TILINGS["one by one"](mechanism.on(model, size=SIZE)), **run)
    # A route by maps knows more of the picture with every tile.
    assert "maps" in mechanism.name or "before" in mechanism.name or difference(apart, result) < 1e-4


@pytest.mark.parametrize(
    "name", ["recycled self-attention in a region", "layout bias", "multi-source swap", "dual branch"]
)
def test_prompts_in_calls_of_their_own(name: str, model: Any) -> None:
    (mechanism,) = (m for m in MECHANISMS if m.name == name)
    patched = mechanism.on(model)
    assert difference(sample(prompt_by_prompt(patched), batch=2), sample(patched, batch=2)) < ROUNDING


def test_a_part_that_cannot_be_found_is_left_alone_with_one_warning(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def larger(apply: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
        x = torch.nn.functional.interpolate(given["input"], scale_factor=1.5, mode="bilinear")
        out = apply(x, given["timestep"], **given["c"])
        return torch.nn.functional.interpolate(out, given["input"].shape[-2:], mode="bilinear")

    def enlarged(target: Any) -> Any:
        clone = target.clone()
        clone.set_model_unet_function_wrapper(larger)
        return clone

    caplog.set_level(logging.WARNING)
    theirs = sample(enlarged(model), steps=3)
    # What needs no places acts; what needs some does not.
    assert difference(sample(enlarged(recycled(model)), steps=3), theirs) > FEW
    assert not caplog.records
    assert torch.equal(sample(enlarged(recycled(model, region_mask=checkered((8, 8)))), steps=3), theirs)
    (record,) = caplog.records
    assert "Recycled Self-Attention" in record.getMessage()


# Pure tensors


def test_parts_are_found_in_any_order() -> None:
    whole = randn(2, 4, 9, 11)
    tile, rolled = whole[:, :, 2:6, 3:8], whole[0].roll(4, -1)[:, 2:6, 3:8]
    rows = [tile[1], tile[0], rolled, whole[0][:, [8, 0, 4, 5]][..., :5]]
    spots = spots_of(torch.stack(rows), whole)
    assert [spot.picture for spot in spots] == [1, 0, 0, 0]
    assert spots[0].lines == spots[1].lines == ((2, 3, 4, 5), (3, 4, 5, 6, 7))
    assert spots[2].lines == ((2, 3, 4, 5), (10, 0, 1, 2, 3))
    assert spots[3].lines == ((8, 0, 4, 5), (0, 1, 2, 3, 4))
    assert spots_of(torch.stack([rows[0], rows[0] + 1e-3]), whole) is None
    runs = runs_of([spots[0], spots[1], spots[0], spots[1]], 2)
    assert [run[:3] for run in runs] == [(slice(0, 2), 0, (1, 0)), (slice(2, 4), 1, (1, 0))]
    assert runs_of(spots, 2) is None
