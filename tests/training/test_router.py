"""The second stage's equations by hand: what is chosen and drawn, Eq. 4 to 8 in a pass, and how maps are measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hosting.random_models import generator
from subject_patches.encoders.subject_encoder import read_subject_encoder
from subject_patches.patches.families.unet import sites_of
from subject_patches.patches.mechanisms.attention_maps import resized
from subject_patches.patches.mechanisms.routed_reference import routed_reference_attention, token_attention
from subject_patches.patches.parts.masks import tokens_inside
from subject_patches.patches.parts.sites import Site
from subject_patches.tests.shared.models import small_model
from subject_patches.tests.shared.subject_encoders import file_for, written
from subject_patches.training.router import (
    WEIGHT,
    RoutedPass,
    Shown,
    chosen,
    gumbel,
    intersection_over_union,
    overlap,
    routing_loss,
    routing_pass,
    spread,
    true_maps,
)
from torch import Tensor


def test_a_choice_is_drawn_by_its_softmax() -> None:
    """By Gumbel's noise as often as the softmax says; 0 and 1, with the gradient of the softmax that decided."""
    logits = torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1).repeat(1, 1, 20000)
    noise = gumbel(logits, generator(1))
    assert noise.isfinite().all()
    drawn = chosen(logits, noise)
    torch.testing.assert_close(drawn, drawn.round())
    assert drawn.round().sum(1).unique().tolist() == [1]
    assert drawn.mean(2)[0].tolist() == pytest.approx(logits[0, :, 0].softmax(0).tolist(), abs=0.02)
    logits, noise, weight = (torch.randn(2, 3, 4, generator=generator(seed)) for seed in (2, 3, 4))
    gradients = []
    for function in (lambda given: chosen(given, noise), lambda given: (given + noise).softmax(1)):
        given = logits.clone().requires_grad_()
        (function(given) * weight).sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients)


def test_the_error_of_maps() -> None:
    """Two subjects and the background at two places: the sum over the places, the mean over who is there."""
    odds = torch.tensor([[2.0, 1.0], [1.0, 1.0], [1.0, 2.0]])
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    first, second = (0.5**2 + 0.25**2), (0.25**2 + 0.75**2)
    logits, both = odds.log()[None].repeat(2, 1, 1), torch.ones(2, 2, dtype=torch.bool)
    truth = truth[None].repeat(2, 1, 1)
    assert float(routing_loss(logits, truth, both)) == pytest.approx((first + second) / 2)
    there = torch.tensor([[True, False], [True, True]])
    assert float(routing_loss(logits, truth, there)) == pytest.approx((2 * first + second) / 3)
    assert float(routing_loss(logits, truth, ~both)) == 0
    # Of a pass, the mean over its layers, coarse and refined alike; another grid has the masks' places there.
    other = torch.zeros_like(logits)
    masks = truth[:, :, None].repeat_interleave(2, 3)
    made = RoutedPass(maps={Site("cross", "middle", 0, 0): (logits, other, (1, 2))})
    one = float(made.loss(masks, both))
    assert one == pytest.approx(float(routing_loss(logits, truth, both) + routing_loss(other, truth, both)) / 2)
    made.maps[Site("cross", "output", 0, 0)] = (other, other, (1, 2))
    assert float(made.loss(masks, both)) == pytest.approx((one + float(routing_loss(other, truth, both))) / 2)
    assert WEIGHT == 0.1


def test_how_well_maps_fit() -> None:
    """Of each subject that is there, in turn, coarse and refined: what both give it by what either does."""
    masks = torch.zeros(2, 2, 2, 2)
    masks[:, 0, 0] = 1
    masks[0, 1, 1, 1] = 1
    present = torch.tensor([[True, True], [True, False]])
    route = torch.tensor([[0, 1, 1, 1], [0, 0, 2, 0]])
    refined = torch.nn.functional.one_hot(route, 3).mT.float()
    coarse = torch.nn.functional.one_hot(torch.tensor([[0, 0, 2, 1], [2, 2, 2, 2]]), 3).mT.float()
    site = Site("cross", "middle", 0, 0)
    found = intersection_over_union({site: (coarse, refined, (2, 2))}, masks, present, [site])
    assert [each.tolist() for each in found[site]] == [
        [1, 1, 0],
        [pytest.approx(1 / 2), pytest.approx(1 / 3), pytest.approx(2 / 3)],
    ]
    nowhere = torch.zeros(1, 4, dtype=torch.bool)
    assert overlap(nowhere, nowhere).tolist() == [0]


def test_who_belongs_to_which_row() -> None:
    present = torch.tensor([[True, False], [True, True]])
    made = spread(torch.arange(1.0, 7.0).view(3, 2), present)
    assert made.tolist() == [[[1, 2], [0, 0]], [[3, 4], [5, 6]]]
    masks = torch.zeros(1, 2, 4, 4)
    masks[0, 1, 2:, 2:] = 1
    assert true_maps(masks, (2, 2))[0, 1].tolist() == [0, 0, 0, 1]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def test_a_pass_by_hand(tmp_path: Path) -> None:
    """Two rows, of two subjects and of one: Eq. 5 at a cross-attention, Eq. 6 to 8 at the self-attention behind it, of
    another grid, by what was drawn; asked again, with other maps there by then, each gives the same."""
    model = small_model()
    encoder = read_subject_encoder(written(tmp_path / "e.safetensors", *file_for(model, routed=True)))
    modules, router, order = encoder.modules, encoder.router.model, sites_of(model.model.diffusion_model)
    present, inside = torch.tensor([[True, True], [True, False]]), torch.zeros(2, 2, 8, 8)
    inside[:, :, 2:6] = 1
    inside[0, 1, :, 4:] = 0
    shown = Shown(drawn(2, 2, 4, 8, 8, seed=1), inside, drawn(2, 2, 5, 32, seed=2), drawn(1, 5, 32, seed=3), present)
    made = routing_pass(modules, router, shown, order, generator(4))
    first = next(site for site in order if site.kind == "cross")
    place = next(n for n, site in enumerate(order) if site.kind == "cross" and site.block == "output")
    cross, behind = order[place], next(site for site in order[place:] if site.kind == "self")
    last = next(site for site in order[place + 1 :] if site.kind == "cross")

    def given(site: Site, tokens: int, side: int, seed: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        width = modules.cross.get(site) or modules.reference.at(site).to_k.weight.shape[0]
        extra = {"n_heads": 2, "activations_shape": (2, width, side, side)}
        return drawn(2, side**2, width, seed=seed), *(drawn(2, tokens, width, seed=seed + n) for n in (1, 2)), extra

    def run(site: Site, of: tuple[Any, ...]) -> Tensor:
        return made.slots["attn2" if site.kind == "cross" else "attn1"][site.key](*of)

    early = given(behind, 64, 8, 20)
    plain = token_attention(*early[:3], 2)
    torch.testing.assert_close(run(behind, early), plain)

    made = routing_pass(modules, router, shown, order, generator(4))
    query, key, value, _ = cross_given = given(cross, 7, 4, 10)
    query.requires_grad_()
    with torch.no_grad():
        run(first, given(first, 7, 8, 40))
        output = run(cross, cross_given)
    source = generator(4)
    gumbel(made.maps[first][1], source)
    _, refined, grid = made.maps[cross]
    assert grid == (4, 4)
    route = (refined + gumbel(refined, source)).argmax(1)
    assert route[0].unique().tolist() == [0, 1, 2]
    assert set(route[1].tolist()) == {0, 2}
    prompts = modules.prompts(torch.cat([shown.features, shown.nothing.expand(2, 1, -1, -1)], 1).flatten(0, 1))
    keys, values = (each.unflatten(0, (2, 3)) for each in prompts[cross])
    terms = torch.stack([token_attention(query, keys[:, n], values[:, n], 2) for n in range(3)], 1)
    own = terms.gather(1, route[:, None, :, None].expand(-1, -1, -1, terms.shape[-1]))[:, 0]
    torch.testing.assert_close(output, token_attention(query, key, value, 2) + own)

    again = run(behind, early)
    wide = resized(refined.unflatten(-1, grid), (8, 8)).flatten(2)
    maps = chosen(wide, gumbel(wide, source))[:, :-1].round()
    key, value, of = modules.references(shown.latents.flatten(0, 1), inside.flatten(0, 1))[behind]
    key, value = (each.unflatten(0, (2, 2)) for each in (key, value))
    for row in range(2):
        there = [tokens_inside(inside[row, n][None], of)[0] for n in range(2)]
        lent = [[each[row, n][None, there[n]] for n in range(2)] for each in (key, value)]
        mine = [each[row : row + 1] for each in early[:3]]
        wanted = routed_reference_attention(
            mine[0], [mine[1], *lent[0]], [mine[2], *lent[1]], maps[row][None], [0.0, 0.0], 2
        )
        torch.testing.assert_close(again[row][None], wanted)
    assert (again - plain).abs().max() > 0.01

    run(last, given(last, 7, 4, 30))
    with torch.no_grad():
        assert torch.equal(run(cross, cross_given), output)
    assert torch.equal(run(behind, early), again)
    assert made.maps[cross][1] is refined
    # What decides is taught by no other layer's loss.
    made = routing_pass(modules, router, shown, order, generator(4))
    run(cross, cross_given)
    assert not made.loss(torch.ones(2, 2, 4, 4), present).requires_grad
