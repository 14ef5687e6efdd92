"""Routed reference attention: AnyStory's equations, by themselves and in sampling runs of the host."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comfy.ldm.modules import attention as host
from comfy_extras.nodes_tomesd import TomePatchModel
from subject_patches.nodes.routed_reference import SubjectShareNode
from subject_patches.patches.call import AttentionCall
from subject_patches.patches.chunk import Chunk
from subject_patches.patches.engine import add_edit
from subject_patches.patches.execution import execute
from subject_patches.patches.families import attention_sites
from subject_patches.patches.families.unet import layer_at
from subject_patches.patches.image_prompt import TokenPrompt
from subject_patches.patches.routed_reference import inject, routed_reference_attention
from subject_patches.patches.router import one_hot
from subject_patches.patches.sites import Site
from subject_patches.patches.window import Window
from subject_patches.tests import dense
from subject_patches.tests.look import Look
from subject_patches.tests.models import (
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
    small_model,
    subject,
)
from subject_patches.tests.references import keys_and_values
from torch import Tensor

TOLERANCE = 1e-5
SIZE = (7, 10)
CHUNK = Chunk(slice(0, 1), "positive", True, {}, (8, 8))


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


# Exactness: grouped by route as against the dense, masked softmax


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return host.attention_pytorch(query, key, value, 3, mask)


def routes(kind: str, rows: int, queries: int, count: int) -> Tensor:
    if kind == "random":
        return torch.randint(count + 1, (rows, queries))
    if kind == "one for all rows":
        return torch.randint(count + 1, (1, queries))
    if kind == "empty groups":
        return torch.randint(2, (rows, queries)) * count
    return torch.full((rows, queries), count)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("kind", ["random", "one for all rows", "empty groups", "all background"])
@pytest.mark.parametrize("gammas", [False, True])
def test_grouped_by_route_is_the_masked_softmax(count: int, kind: str, gammas: bool) -> None:
    torch.manual_seed(count)
    rows, queries, channels = 2, 31, 12
    route = routes(kind, rows, queries, count)
    gamma = torch.randn(count).tolist() if gammas else [0.0] * count
    own = [torch.randn(rows, queries, channels) for _ in range(3)]
    call = AttentionCall(*own, 3, Site("self", "middle", 0, 0), CHUNK, None)
    keys, values = [call.key], [call.value]
    for number in range(count):
        key, value = torch.randn(2, 1, 4 + number, channels)
        bias = torch.tensor(gamma[number]).view(1, 1, 1) if gammas else None
        call.extend(key, value, bias, route == number)
        keys.append(key.expand(rows, -1, -1))
        values.append(value.expand(rows, -1, -1))
    maps = one_hot(route.expand(rows, -1), count)
    right = routed_reference_attention(call.query, keys, values, maps, gamma, 3)
    masks_seen: list[Tensor | None] = []

    def counted(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        masks_seen.append(mask)
        return attend(query, key, value, mask)

    (output,) = execute([call], counted)
    torch.testing.assert_close(output, right, rtol=0, atol=TOLERANCE)
    # What is written as equations is what another hand computes in float64.
    again = dense.attention(call.query, call.key, call.value, 3, None, call.extensions)
    torch.testing.assert_close(right.double(), again, rtol=0, atol=TOLERANCE)
    # A mask over queries is never made: a gamma is a vector over keys.
    assert all(mask is None or mask.shape[1] == 1 for mask in masks_seen)
    assert gammas or set(masks_seen) == {None}


@pytest.mark.parametrize("rows", [1, 3])
def test_equation_5_of_one_subject(rows: int) -> None:
    source = generator(5)
    query, output = torch.randn(2, 3, 11, 12, generator=source)
    key, value = torch.randn(2, 1, 4, 12, generator=source)
    route = torch.randint(3, (rows, 11), generator=source)
    term = dense.attention(query, key.expand(3, -1, -1), value.expand(3, -1, -1), 3)
    before = output.clone()
    for number in (0, 1, 5):
        mine = route == number
        right = output.double() + 0.7 * mine[..., None] * term
        torch.testing.assert_close(
            inject(output, query, key, value, 3, mine, 0.7).double(), right, rtol=0, atol=TOLERANCE
        )
    assert torch.equal(output, before)


# In runs


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


# Nodes


def test_a_share_belongs_to_its_subjects() -> None:
    one, other = subject(seed=1), subject(seed=2)
    prompted = [[torch.ones(1, 3, CONTEXT), {}]]
    shared = SubjectShareNode.execute((one, other), 2.0, 0.1, 0.6, prompted, 0.5).args[0]
    for before, after in zip((one, other), shared, strict=True):
        assert after.cache is before.cache
        assert (after.share.strength, after.share.window, after.share.eta) == (2.0, Window(0.1, 0.6), 0.5)
        assert after.share.prompt.tokens.shape == (1, 3, CONTEXT)
        assert before.share.prompt is None


@pytest.mark.parametrize("several", [prompt(1) + prompt(2), [[torch.ones(2, 3, CONTEXT), {}]]])
def test_an_image_prompt_of_several_is_refused(several: Any) -> None:
    """Only the first would act."""
    with pytest.raises(ValueError, match=r"The image prompt has \d prompts of \d rows, of which only one can act; con"):
        SubjectShareNode.execute((subject(),), image_prompt=several)


def test_bad_numbers_of_subjects(model: Any) -> None:
    nine = tuple(subject(seed=number) for number in range(9))
    with pytest.raises(ValueError, match="There are 9 subjects; one node takes 1 to 8"):
        routed(model, nine, map_router())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strength": -0.1}, r"The strength is -0\.1; give a number from 0 to 10\."),
        ({"eta": math.inf}, "The eta is inf; give a number from 0 to 10"),
        ({"noise_level": "low"}, "noise_level is 'low'; choose one of usual, current, fixed, nearly clean"),
        ({"cross_attention": "none"}, "cross_attention is 'none'; choose one of kept, skipped"),
        ({"start_percent": 0.7, "end_percent": 0.3}, "The window starts at 0.7, after its end at 0.3"),
        ({"background_prompt": []}, "The background prompt is an empty conditioning; connect one with tokens"),
        (
            {"background_prompt": [[torch.ones(1, 2, CONTEXT + 1), {}]]},
            f"The background prompt has tokens of {CONTEXT + 1} channels but this model's prompts have {CONTEXT}; enc",
        ),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str, model: Any) -> None:
    with pytest.raises(ValueError, match=message):
        routed(model, (subject(),), **values)


def test_an_image_prompt_of_another_model(model: Any) -> None:
    with pytest.raises(ValueError, match="The image prompt of subject 2 has tokens of 8 channels but this model's"):
        routed(model, (subject(), subject(prompt=TokenPrompt(torch.ones(1, 2, 8)))))


@pytest.mark.parametrize("values", [{"strength": math.nan}, {"eta": -1.0}, {"start_percent": 2.0}])
def test_bad_shares(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give a number from 0 to"):
        SubjectShareNode.execute((subject(),), **values)


# Beside others


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


def test_what_two_windows_have_in_common() -> None:
    assert Window(0.2, 0.8) & Window(0.5, 1.0) == Window(0.5, 0.8)
    assert (Window(0.0, 0.3) & Window(0.5, 1.0)).empty
