"""Who has which place: routes of masks and of maps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from comfy.conds import CONDCrossAttn
from subject_patches.patches.engine.call import AttentionCall, prompt_keys
from subject_patches.patches.engine.chunk import Chunk
from subject_patches.patches.families import attention_sites
from subject_patches.patches.mechanisms.attention_maps import attention_maps, normalised, resized, smoothed
from subject_patches.patches.mechanisms.map_router import MapRouter, route_of_maps, tokens_in_turn
from subject_patches.patches.mechanisms.mask_router import MaskRouter, route_of_cover
from subject_patches.patches.mechanisms.router import Route, one_hot
from subject_patches.patches.mechanisms.subject import Subject
from subject_patches.patches.parts.sites import Site
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared import dense
from subject_patches.tests.shared.models import generator
from torch import Tensor

SELF, CROSS = Site("self", "middle", 0, 0), Site("cross", "middle", 0, 0)


def called(*phrases: str) -> tuple[Subject, ...]:
    return tuple(Subject((), phrase) for phrase in phrases)


def mask_call(grid: tuple[int, int], area: tuple[int, int, int, int] | None = None) -> AttentionCall:
    query = torch.zeros(2, math.prod(grid), 4)
    chunk = Chunk(slice(0, 2), "positive", True, {}, (16, 24), area)
    return AttentionCall(query, query, query, 1, SELF, chunk, grid)


def cross_call(
    length: int = 7, turns: int = 1, grid: tuple[int, int] = (4, 6), spans: Any = None, **values: Any
) -> AttentionCall:
    source = generator(3)
    query = torch.randn(2, math.prod(grid), 8, generator=source) * 2
    key = torch.randn(2, length, 8, generator=source).repeat(1, turns, 1)
    conditioning = {"model_conds": {"c_crossattn": CONDCrossAttn(torch.zeros(1, length, 8))}, "uuid": 1, **values}
    if spans is not None:
        conditioning["subject_patches_spans"] = spans
    chunk = Chunk(slice(0, 2), "positive", True, conditioning, (8, 12))
    return AttentionCall(
        query, key, torch.randn(key.shape, generator=source), 2, CROSS, chunk, grid, prompt_keys(CROSS, key, chunk)
    )


def test_places_of_a_route() -> None:
    route = Route(torch.tensor([[0, 2, 3, 0], [3, 3, 3, 0]]), 3)
    assert route.places(0).tolist() == [[True, False, False, True], [False, False, False, True]]
    assert route.places(2).tolist() == [[False, True, False, False], [False] * 4]
    assert route.places(3).tolist() == [[False, False, True, False], [True, True, True, False]]
    assert route.places(1) is None


def test_a_place_goes_to_whoever_covers_most_of_it() -> None:
    cover = torch.tensor([[1.0, 0.5, 0.4, 0.0, 0.2], [0.0, 0.5, 0.2, 0.5, 0.1]])
    route = route_of_cover(cover)
    assert route.tolist() == [[0, route[0, 1].item(), 0, 1, 2]]
    assert route[0, 1] in (0, 1)


def test_a_subject_too_small_for_a_grid_keeps_its_best_place() -> None:
    cover = torch.tensor([[0.1, 0.3, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.8]])
    assert route_of_cover(cover).tolist() == [[3, 0, 3, 2]]


def test_one_hot_maps_are_equation_8s() -> None:
    route = torch.tensor([[0, 2, 1, 3, 0]])
    maps = one_hot(route, 3)
    assert maps.tolist() == [[[1, 0, 0, 0, 1], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0]]]


@pytest.mark.parametrize("grid", [(8, 12), (5, 7), (16, 24)])
def test_masks_at_a_grid(grid: tuple[int, int], model: Any) -> None:
    painted = torch.zeros(2, 40, 60, dtype=torch.bool)
    painted[0, :20, :30] = painted[1, 20:, 30:] = True
    routing = MaskRouter(painted).routing(called("a", "b"), attention_sites(model), frozenset({SELF}), Window()).begin()
    route = routing.route(mask_call(grid)).numbers.view(grid)
    y = (torch.arange(grid[0]) + 0.5) / grid[0]
    x = (torch.arange(grid[1]) + 0.5) / grid[1]
    # Cells that an edge cuts in half may go to either side.
    clear = ((y != 0.5)[:, None] & (x != 0.5)).nonzero().tolist()
    for row, column in clear:
        upper, left = bool(y[row] < 0.5), bool(x[column] < 0.5)
        assert route[row, column] == (0 if upper and left else 1 if not upper and not left else 2)


def test_masks_are_cropped_with_an_area(model: Any) -> None:
    painted = torch.zeros(1, 16, 24, dtype=torch.bool)
    painted[0, :8, :12] = True
    routing = MaskRouter(painted).routing(called("a"), attention_sites(model), frozenset({SELF}), Window()).begin()
    assert bool((routing.route(mask_call((4, 6), (8, 12, 0, 0))).numbers == 0).all())
    assert bool((routing.route(mask_call((4, 6), (8, 12, 0, 12))).numbers[0, 1:] == 1).all())


def test_maps_are_the_phrases_attention() -> None:
    call = cross_call()
    call.bias(torch.randn(1, 24, 7, generator=generator(4)))
    shares = dense.shares(call.query, call.key, 2, call.bias_of()).mean(1)
    maps = attention_maps(call, [[2, 3], [5], []])
    right = torch.stack([shares[..., 2] + shares[..., 3], shares[..., 5], torch.zeros(2, 24).double()], 1)
    torch.testing.assert_close(maps.double(), right.unflatten(-1, (4, 6)), rtol=0, atol=1e-6)


def test_maps_of_a_prompt_that_the_host_repeats() -> None:
    torch.testing.assert_close(attention_maps(cross_call(turns=3), [[2, 3]]), attention_maps(cross_call(), [[2, 3]]))


def test_no_maps_where_another_pack_changed_the_tokens() -> None:
    call = cross_call(turns=2)
    assert prompt_keys(CROSS, call.key[:, :-1], call.chunk) is None
    call.prompt = None
    assert attention_maps(call, [[2]]) is None


def test_stretched_maps() -> None:
    maps = torch.tensor([[[[2.0, 4.0], [3.0, 6.0]], [[5.0, 5.0], [5.0, 5.0]]]])
    assert normalised(maps).tolist() == [[[[0, 0.5], [0.25, 1]], [[0, 0], [0, 0]]]]


def test_smoothing_is_a_gaussian_of_a_share_of_the_side() -> None:
    maps = torch.zeros(1, 1, 21, 31)
    maps[..., 10, 15] = 1
    blurred = smoothed(maps, 0.1)[0, 0]
    y, x = torch.meshgrid(torch.arange(21) - 10, torch.arange(31) - 15, indexing="ij")
    right = torch.exp(-(x**2 + y**2) / (2 * 2.1**2))
    torch.testing.assert_close(blurred, right / right.sum(), rtol=0, atol=1e-3)
    assert smoothed(maps, 0.0) is maps
    # A kernel wider than the picture repeats its border.
    assert smoothed(torch.ones(1, 2, 2, 3), 0.5).allclose(torch.ones(1, 2, 2, 3))


def test_resized_maps_keep_their_mean_when_coarser() -> None:
    maps = torch.rand(1, 2, 8, 12, generator=generator(1))
    assert resized(maps, (8, 12)) is maps
    torch.testing.assert_close(resized(maps, (4, 6)).mean(), maps.mean(), rtol=0.02, atol=0)


def test_a_place_goes_to_the_highest_map_above_the_threshold() -> None:
    maps = torch.tensor([[[[0.9, 0.3, 0.5]], [[0.2, 0.4, 0.8]]]])
    assert route_of_maps(maps, 0.4).tolist() == [[0, 2, 1]]
    assert route_of_maps(maps, 1.0).tolist() == [[2, 2, 2]]


def test_subjects_of_one_phrase_take_its_occurrences_in_turn() -> None:
    spans = {"Red  Dog": ((1, 3), (5, 7)), "cat": ((9, 10), (12, 13))}
    assert tokens_in_turn(spans, ("cat", "red dog", "RED dog")) == [[9, 12], [1, 2], [5, 6]]
    assert tokens_in_turn(spans, ("cat", "cat", "cat", "bird")) == [[9], [12], [], []]


SPANS = {"a": ((1, 2),), "b": ((4, 6),)}


def read_maps(call: AttentionCall, smoothing: float = 0.0) -> Tensor:
    return normalised(smoothed(attention_maps(call, [[1], [4, 5]]), smoothing))


@pytest.mark.parametrize("mean", [False, True])
def test_a_layer_goes_by_what_the_layers_before_it_say(mean: bool, model: Any) -> None:
    order = attention_sites(model)
    acting = frozenset(site for site in order if site.kind == "self")
    router = MapRouter(0.3, 0.0, mean)
    routing = router.routing(called("a", "b"), order, acting, Window(0.2, 0.8)).begin()
    assert routing.window == (Window(0.0, 0.8) if mean else Window(0.2, 0.8))
    assert not mean or {site for site in routing.sites if site.kind == "cross"} == {
        site for site in order if site.kind == "cross"
    }
    first, second = order[1], order[3]
    assert (first.kind, order[2].kind, second.kind, order[4].kind) == ("cross", "self", "cross", "self")

    def go(site: Site, grid: tuple[int, int], sigma: float) -> tuple[AttentionCall, Tensor | None]:
        call = cross_call(spans=SPANS, grid=grid)
        call.query = call.query.roll(sum(map(ord, str(site))), 1)
        call.site = site
        routing.amend(call, sigma, lambda stream: None)
        route = None if site.kind == "cross" else routing.route(call)
        routing.observe(call, sigma, lambda stream: None)
        return call, None if route is None else route.numbers

    assert go(order[0], (4, 6), 3.0)[1] is None
    one, _ = go(first, (4, 6), 3.0)
    _, route = go(order[2], (8, 12), 3.0)
    at = resized(read_maps(one), (8, 12))
    expected = route_of_maps(normalised(at) if mean else at, 0.3)
    assert torch.equal(route, expected)
    assert len(set(route.flatten().tolist())) == 3
    two, _ = go(second, (2, 3), 3.0)
    call, route = go(order[4], (8, 12), 3.0)
    other = resized(read_maps(two), (8, 12))
    right = normalised((at + other) / 2) if mean else other
    assert torch.equal(route, route_of_maps(right, 0.3))
    note = call.notes[0]
    assert (note.name, note.labels) == ("routing map", ("a", "b"))
    assert torch.equal(note.maps(), one_hot(route, 2).unflatten(-1, (8, 12)))
    # Of the step before, the preceding layer says nothing any more.
    assert (go(order[4], (8, 12), 2.0)[1] is None) is not mean
    assert go(order[0], (4, 6), 2.0)[1] is None or mean
    # A run of its own knows nothing yet.
    assert routing.begin().route(call) is None


def test_maps_of_tiles_go_with_their_step() -> None:
    routing = MapRouter(running_mean=False).routing(called("dog"), (CROSS,), frozenset({CROSS}), Window()).begin()
    for sigma in (3.0, 2.0, 1.0):
        call = cross_call(spans={"dog": ((1, 2),)})
        call.chunk = replace(call.chunk, area=(8, 6, 0, 0), pictures=(0, 1), count=2)
        routing.amend(call, sigma, lambda stream: None)
        routing.observe(call, sigma, lambda stream: None)
        assert routing.route(call) is not None
        assert len(routing._canvases) == 1
