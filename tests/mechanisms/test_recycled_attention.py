"""Recycled self-attention: AnyLogo's equations, in sampling runs of the host."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.families import attention_sites
from subject_patches.patches.mechanisms.recycled_attention import extended_attention, flow_bias, is_recycled
from subject_patches.patches.parts.sites import Site
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared import dense
from subject_patches.tests.shared.look import Look, Seen
from subject_patches.tests.shared.models import (
    difference,
    generator,
    prompt,
    recycled,
    reference,
    sample,
    subject,
)
from subject_patches.tests.shared.references import keys_and_values
from torch import Tensor

TOLERANCE = 1e-5
SIZE = (7, 10)


def looked_at(model: Any, **run: Any) -> Look:
    look = Look(frozenset(site for site in attention_sites(model) if site.kind == "self"), Window())
    sample(add_edit(model, look), **{"size": SIZE, "batch": 2, **run})
    return look


def check(seen: Seen, keys: list[Tensor], values: list[Tensor], bias: Tensor | None = None) -> None:
    """The output is Eq. 4 over the generation's own tensors and these, all in float64."""
    call = seen.call
    key, value = torch.cat([call.key, *keys], 1), torch.cat([call.value, *values], 1)
    right = dense.attention(call.query, key, value, call.heads, bias)
    torch.testing.assert_close(seen.output.double(), right, rtol=0, atol=TOLERANCE)


def expand(tensors: tuple[Tensor, ...], rows: int = 2) -> tuple[Tensor, ...]:
    return tuple(tensor.expand(rows, -1, -1) for tensor in tensors)


@pytest.mark.parametrize("masked", [True, False])
def test_equation_4(masked: bool, model: Any) -> None:
    who = subject(reference(masked=masked), reference(1, (5, 5), masked=masked))
    look = looked_at(recycled(model, (who,), seed=9))
    decoder = {site for site in attention_sites(model) if site.kind == "self" and site.stage != "encoder"}
    assert len(look.of("positive")) == 2 * 7
    for seen in look.of("positive"):
        if seen.call.site not in decoder:
            check(seen, [], [])
            continue
        both = [keys_and_values(model, who, number, seen.sigma, 9)[seen.call.site] for number in (0, 1)]
        keys, values = zip(*(expand(pair) for pair in both), strict=True)
        check(seen, list(keys), list(values))
        assert difference(seen.output, dense.attention(seen.call.query, seen.call.key, seen.call.value, 8)) > 0.01


def test_only_conditioned_chunks_get_the_reference(model: Any) -> None:
    look = looked_at(recycled(model))
    assert look.of("negative")
    for seen in look.of("negative"):
        assert not seen.call.extensions
        check(seen, [], [])


def test_both_gives_it_to_the_negative_prompt_too(model: Any) -> None:
    look = looked_at(recycled(model, apply_to="both"))
    assert [len(seen.call.extensions) for seen in look.of("negative")] == [
        len(seen.call.extensions) for seen in look.of("positive")
    ]


@pytest.mark.parametrize("strength", [0.25, 4.0])
def test_strength_multiplies_the_reference_keys_weights(strength: float, model: Any) -> None:
    who = subject()
    look = looked_at(recycled(model, (who,), strength=strength, seed=2, sites="named", named_sites="output.3"))
    for seen in (s for s in look.of("positive") if s.call.site.number == 3 and s.call.site.block == "output"):
        key, value = expand(keys_and_values(model, who, 0, seen.sigma, 2)[seen.call.site])
        call = seen.call
        weights = dense.logits_of(call.query, torch.cat([call.key, key], 1), call.heads).exp()
        weights[..., call.key.shape[1] :] *= strength
        right = (weights / weights.sum(-1, keepdim=True)) @ dense.split(torch.cat([call.value, value], 1), call.heads)
        right = right.permute(0, 2, 1, 3).flatten(2)
        torch.testing.assert_close(seen.output.double(), right, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_region_mask_is_where_queries_see_the_reference(strength: float, model: Any) -> None:
    who = subject()
    region = torch.zeros(1, *SIZE)
    region[:, 2:5, 3:9] = 1
    region[:, 2:3] *= 0.5
    patched = recycled(model, (who,), strength=strength, region_mask=region, sites="named", named_sites="output.3")
    for seen in (s for s in looked_at(patched).of("positive") if s.call.extensions):
        assert seen.call.grid == SIZE
        key, value = expand(keys_and_values(model, who, 0, seen.sigma, 0)[seen.call.site])
        weight = strength * region.flatten(1)[..., None].expand(-1, -1, key.shape[1])
        own = torch.zeros(1, math.prod(SIZE), seen.call.key.shape[1])
        check(seen, [key], [value], torch.cat([own, weight.log()], -1))


def test_each_picture_of_a_batch_may_have_its_own_region(model: Any) -> None:
    who = subject()
    region = torch.zeros(2, *SIZE)
    region[0, :, :4], region[1, :, 6:] = 1, 1
    values = {"sites": "encoder and decoder", "region_mask": region}
    together = sample(recycled(model, (who,), **values), batch=2, size=SIZE)
    for row in (0, 1):
        own = recycled(model, (who,), **{**values, "region_mask": region[row : row + 1]})
        assert difference(together[row : row + 1], sample(own, size=SIZE, seed=5 + row)) < 2e-5


def test_the_reference_takes_another_prompt_when_given(model: Any) -> None:
    who, other = subject(), prompt(77, 5)
    given = sample(recycled(model, (who,), reference_conditioning=other))
    assert difference(given, sample(recycled(model, (who,)))) > 0.01
    same = sample(recycled(model, (who,), reference_conditioning=prompt(1)))
    assert torch.equal(same, sample(recycled(model, (who,))))


def test_windows_are_the_hosts_percents(model: Any) -> None:
    seen = looked_at(recycled(model, start_percent=0.3, end_percent=0.8), steps=8).of("positive")
    to_sigma = model.model.model_sampling.percent_to_sigma
    inside = {s.sigma for s in seen if s.call.extensions}
    assert inside == {s.sigma for s in seen if to_sigma(0.8) <= s.sigma <= to_sigma(0.3)}
    assert 0 < len(inside) < 8


# Eq. 5


def sites(count: int) -> list[Site]:
    return [Site("self", "output", number, index) for number in range(count) for index in range(10)]


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_the_share_of_kept_layers_is_the_probability(keep: float) -> None:
    draws = [is_recycled(keep, seed, sigma, s) for seed in range(10) for sigma in (14.6, 3.2, 0.5) for s in sites(10)]
    # Three standard deviations of the mean of 3,000 draws.
    assert abs(sum(draws) / len(draws) - keep) < 3 * math.sqrt(keep * (1 - keep) / len(draws))
    for seed in range(4):
        kept = [is_recycled(keep, seed, 3.2, s) for s in sites(10)]
        assert 0 < sum(kept) < 100


def test_draws_are_fixed_and_nested() -> None:
    places = [(sigma, site) for sigma in (14.6, 0.5) for site in sites(10)]
    assert all(is_recycled(1.0, 3, *place) for place in places)
    assert not any(is_recycled(0.0, 3, *place) for place in places)
    forwards = [is_recycled(0.5, 3, *place) for place in places]
    assert [is_recycled(0.5, 3, *place) for place in reversed(places)] == forwards[::-1]
    assert forwards != [is_recycled(0.5, 4, *place) for place in places]
    # A larger probability keeps what a smaller one kept.
    assert all(is_recycled(0.7, 3, *place) for place, kept in zip(places, forwards, strict=True) if kept)


def test_sparse_recycling_in_a_run(model: Any) -> None:
    look = looked_at(recycled(model, keep_probability=0.5, seed=3), steps=4)
    decoder = [s for s in look.of("positive") if s.call.site.stage != "encoder"]
    for seen in decoder:
        assert bool(seen.call.extensions) == is_recycled(0.5, 3, seen.sigma, seen.call.site)
    assert {bool(seen.call.extensions) for seen in decoder} == {True, False}


# The equations as the file writes them


def test_extended_attention_is_equation_4() -> None:
    query, *others = torch.randn(5, 2, 6, 12, generator=generator(0))
    keys, values = others[:2], others[2:]
    right = dense.attention(query, torch.cat(keys, 1), torch.cat(values, 1), 3)
    torch.testing.assert_close(extended_attention(query, keys, values, 3).double(), right, rtol=0, atol=TOLERANCE)


def test_flow_bias() -> None:
    region = torch.tensor([[0.0, 0.25, 1.0]])
    assert flow_bias(1.0, None) is None
    assert flow_bias(1.0, region.round()) is None
    assert float(flow_bias(2.0, region.round())) == pytest.approx(math.log(2))
    graded = flow_bias(2.0, region)
    assert graded.shape == (1, 3, 1)
    torch.testing.assert_close(graded[0, 1:, 0].exp(), torch.tensor([0.5, 2.0]))
    assert graded.isfinite().all()
