"""Routed reference attention in sampling runs of the host: AnyStory's Eq. 5 to 8, layer by layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comfy_extras.nodes_tomesd import TomePatchModel
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.families import attention_sites
from subject_patches.patches.families.unet import layer_at
from subject_patches.patches.mechanisms.image_prompt import TokenPrompt
from subject_patches.patches.mechanisms.routed_reference import routed_reference_attention
from subject_patches.patches.parts.sites import Site
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared import dense
from subject_patches.tests.shared.look import Look
from subject_patches.tests.shared.models import (
    CONTEXT,
    counted,
    difference,
    generator,
    map_router,
    masks,
    prompt,
    reference,
    routed,
    sample,
    subject,
)
from subject_patches.tests.shared.references import keys_and_values
from torch import Tensor

TOLERANCE = 1e-5
SIZE = (7, 10)


def looked_at(model: Any, kind: str = "self", **run: Any) -> Look:
    look = Look(frozenset(site for site in attention_sites(model) if site.kind == kind), Window())
    sample(add_edit(model, look), **{"size": SIZE, "batch": 2, **run})
    return look


def decoder(model: Any) -> set[Site]:
    return {site for site in attention_sites(model) if site.kind == "self" and site.stage != "encoder"}


def stripe(grid: tuple[int, int], number: int, count: int) -> Tensor:
    """Where `masks` has a subject, for grids that it cuts cell by cell or nearly: (places) bool, by areas."""
    cover = torch.nn.functional.adaptive_avg_pool2d(masks(count), grid).flatten(1)
    ground = 1 - cover.sum(0)
    return (cover[number] >= ground) & (cover.argmax(0) == number)


def test_equations_6_to_8(model: Any) -> None:
    who = (
        subject(reference(1), reference(2, (5, 5), masked=False), phrase="one", strength=0.5),
        subject(reference(3, (9, 4)), phrase="two"),
    )
    look = looked_at(routed(model, who, seed=9, strength=3.0))
    assert len(look.of("positive")) == 2 * 7
    for seen in look.of("positive"):
        call = seen.call
        if call.site not in decoder(model):
            assert not call.extensions
            continue
        keys, values, maps, gammas = [call.key], [call.value], [], []
        for number, each in enumerate(who):
            for place in range(len(each.references)):
                key, value = keys_and_values(model, each, place, seen.sigma, 9)[call.site]
                keys.append(key.expand(2, -1, -1))
                values.append(value.expand(2, -1, -1))
                maps.append(stripe(call.grid, number, 2).float())
                gammas.append(math.log(3.0 * each.share.strength))
        right = routed_reference_attention(
            call.query, keys, values, torch.stack(maps).expand(2, -1, -1), gammas, call.heads
        )
        torch.testing.assert_close(seen.output, right, rtol=0, atol=TOLERANCE)
        assert difference(right, dense.attention(call.query, call.key, call.value, call.heads).float()) > 0.01
    assert all(not seen.call.extensions for seen in look.of("negative"))


def test_nearly_clean_without_cross_attention(model: Any) -> None:
    who = subject()
    look = looked_at(routed(model, (who,), seed=9, noise_level="nearly clean", cross_attention="skipped"))
    last = float(model.get_model_object("model_sampling").sigma_min)
    kept = keys_and_values(model, who, 0, last, 9, prompted=False)
    seen_sigmas = set()
    for seen in look.of("positive"):
        if seen.call.site in decoder(model):
            seen_sigmas.add(seen.sigma)
            extension = seen.call.extensions[0]
            torch.testing.assert_close(extension.key, kept[seen.call.site][0], rtol=0, atol=1e-4)
            torch.testing.assert_close(extension.value, kept[seen.call.site][1], rtol=0, atol=1e-4)
    assert len(seen_sigmas) == 2


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"noise_level": "current"}, 4),
        ({"noise_level": "current", "refresh_steps": 3}, 2),
        ({"noise_level": "nearly clean"}, 1),
        ({"noise_level": "fixed", "fixed_level": 0.6}, 1),
    ],
)
def test_how_often_the_model_looks_at_a_reference(settings: dict[str, Any], passes: int, model: Any) -> None:
    rows: list[int] = []
    patched = counted(routed(model, (subject(),), **settings), rows)
    sample(patched, steps=4)
    assert sum(rows) == 2 * 4 + passes
    rows.clear()
    sample(patched, steps=4, seed=6)
    assert sum(rows) == 2 * 4


def test_at_which_level_a_reference_is_looked_at(model: Any) -> None:
    """At the given share of the model's schedule, or at that of the last step at which the model looked."""
    who, fixed = subject(), float(model.get_model_object("model_sampling").percent_to_sigma(0.6))
    for settings in ({"noise_level": "fixed", "fixed_level": 0.6}, {"refresh_steps": 2}):
        look = looked_at(routed(model, (who,), seed=9, **settings), steps=3)
        first, second, third = dict.fromkeys(seen.sigma for seen in look.of("positive"))
        levels = {first: first, second: first, third: third} if "refresh_steps" in settings else {}
        for seen in look.of("positive"):
            if seen.call.site in decoder(model):
                kept = keys_and_values(model, who, 0, levels.get(seen.sigma, fixed), 9)[seen.call.site]
                torch.testing.assert_close(seen.call.extensions[0].key, kept[0], rtol=0, atol=1e-4)


def test_without_cross_attention_another_prompt_is_the_same_pass(model: Any) -> None:
    for how, passes in (("skipped", 0), ("kept", 2)):
        rows: list[int] = []
        patched = counted(routed(model, (subject(),), cross_attention=how), rows)
        sample(patched)
        rows.clear()
        sample(patched, positive=prompt(8))
        assert sum(rows) == 2 * 2 + passes


def test_references_are_read_with_a_prompt_of_their_own(model: Any) -> None:
    given, own, same = (
        sample(routed(model, (subject(),), reference_conditioning=conditioning), positive=prompt(1))
        for conditioning in (prompt(31, 5), None, prompt(1))
    )
    assert difference(given, own) > 0.003
    assert torch.equal(same, own)


def test_kinds_of_passes_do_not_share_features(model: Any) -> None:
    who = subject()
    results = [
        sample(routed(model, (who,), noise_level=level, cross_attention=how))
        for level in ("current", "nearly clean")
        for how in ("kept", "skipped")
    ]
    fresh = sample(routed(model, (subject(),), noise_level="nearly clean", cross_attention="skipped"))
    assert torch.equal(results[-1], fresh)
    for number, one in enumerate(results):
        assert all(difference(one, other) > 1e-4 for other in results[:number])


def test_each_subject_has_a_window_of_its_own(model: Any) -> None:
    early = subject(seed=1, phrase="early", window=Window(0.0, 0.5))
    late = subject(seed=2, phrase="late", window=Window(0.4, 1.0))
    look = looked_at(routed(model, (early, late), start_percent=0.2), steps=10)
    to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    acting = {}
    for seen in look.of("positive"):
        if seen.call.site in decoder(model):
            acting.setdefault(seen.sigma, set()).add(len(seen.call.extensions))
    for sigma, counts in acting.items():
        expected = (to_sigma(0.5) <= sigma <= to_sigma(0.2)) + (sigma <= to_sigma(0.4))
        assert counts == {expected}
    assert {count for counts in acting.values() for count in counts} == {0, 1, 2}


def test_no_subject_is_seen_where_another_is(model: Any) -> None:
    who = tuple(subject(seed=number, phrase=f"s{number}") for number in range(8))
    look = looked_at(routed(model, who, sites="encoder and decoder"), size=(16, 24), batch=1)
    for seen in look.of("positive"):
        routes = torch.cat([extension.route for extension in seen.call.extensions])
        assert len(routes) == 8
        assert int(routes.sum(0).max()) == 1
        assert bool((routes.sum(0) == 0).any()) or seen.call.grid[0] < 4


def test_maps_route_each_picture_of_a_batch_by_itself(model: Any) -> None:
    who = (subject(phrase="subject"), subject(seed=1, phrase="scene"))
    look = looked_at(routed(model, who, map_router(threshold=0.3)))
    differing = 0
    for seen in look.of("positive"):
        if seen.call.extensions:
            routes = torch.stack([extension.route for extension in seen.call.extensions])
            assert routes.shape[1:] == seen.call.query.shape[:2]
            assert int(routes.sum(0).max()) <= 1
            differing += int(not torch.equal(routes[:, 0], routes[:, 1]))
    assert differing > 0


def test_equation_5(model: Any) -> None:
    tokens = [torch.randn(1, count, CONTEXT, generator=generator(40 + count)) for count in (3, 5, 2)]
    who = (
        subject(phrase="one", strength=0.0, prompt=TokenPrompt(tokens[0]), eta=0.5),
        subject(seed=1, phrase="two", strength=0.0, prompt=TokenPrompt(tokens[1])),
    )
    background = [[tokens[2], {}]]
    look = looked_at(routed(model, who, eta=0.8, background_prompt=background, sites="encoder and decoder"), "cross")
    for seen in look.of("positive"):
        call = seen.call
        layer = layer_at(model.model.diffusion_model, call.site)
        mine = [stripe(call.grid, number, 2) for number in range(2)]
        mine.append(~(mine[0] | mine[1]))
        right = dense.attention(call.query, call.key, call.value, call.heads)
        plain = right.clone()
        for places, each, eta in zip(mine, tokens, (0.4, 0.8, 0.8), strict=True):
            key, value = (part(each).detach().expand(2, -1, -1) for part in (layer.to_k, layer.to_v))
            right = right + eta * places[None, :, None] * dense.attention(call.query, key, value, call.heads)
        torch.testing.assert_close(seen.output.double(), right, rtol=0, atol=TOLERANCE)
        assert difference(right, plain) > 0.01
    for seen in look.of("negative"):
        assert not seen.call.blends[:-1]


def test_image_prompts_follow_the_map_of_their_own_layer(model: Any) -> None:
    tokens = torch.randn(1, 3, CONTEXT, generator=generator(43))
    who = subject(strength=0.0, prompt=TokenPrompt(tokens))
    look = looked_at(
        routed(model, (who,), map_router(maps="preceding layer"), sites="encoder and decoder"), "cross", batch=1
    )
    shares = []
    for seen in look.of("positive"):
        call = seen.call
        plain = dense.attention(call.query, call.key, call.value, call.heads)
        shares.append(float(((seen.output - plain).abs().amax(-1) > 1e-4).float().mean()))
    assert all(share > 0 for share in shares)
    assert any(share < 1 for share in shares)


@pytest.mark.parametrize("by_maps", [False, True])
def test_layers_whose_places_another_pack_changed_are_left_alone(by_maps: bool, model: Any) -> None:
    merged = TomePatchModel.execute(model, 0.5).args[0]
    look = looked_at(routed(merged, (subject(),), map_router() if by_maps else None), size=(16, 16), batch=1)
    grids = [seen.call.grid is None for seen in look.of("positive")]
    assert any(grids)
    assert not all(grids)
    for seen in look.of("positive"):
        assert seen.call.grid is not None or not seen.call.extensions
    assert any(seen.call.extensions for seen in look.of("positive"))
