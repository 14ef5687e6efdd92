"""Layout bias in sampling runs of the host, against dense attention in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from subject_patches.patches.engine.chunk import Chunk
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.families import attention_sites
from subject_patches.patches.mechanisms.layout_regions import Layout, Region
from subject_patches.patches.parts.prompt import SPANS_KEY
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared import dense
from subject_patches.tests.shared.layouts import box, resampled
from subject_patches.tests.shared.look import Look, Seen
from subject_patches.tests.shared.models import difference, known_prompt, laid_out, prompt, sample
from torch import Tensor

SIZE = (7, 10)
WIDTH, HEIGHT = 80, 56
LEFT, RIGHT = box(WIDTH, HEIGHT, 3, 8, 50, 40), box(WIDTH, HEIGHT, 36, 20, 79, 56)
OVERLAPPING = Layout(WIDTH, HEIGHT, (Region("subject", LEFT), Region("Scene ", RIGHT)))
SOFT: dict[str, Any] = {"negative_weight": -3.0, "guidance_weight": 0.2}


def looked_at(model: Any, layout: Layout = OVERLAPPING, run: dict[str, Any] | None = None, **values: Any) -> Look:
    look = Look(frozenset(site for site in attention_sites(model) if site.kind == "cross"), Window())
    patched = laid_out(model, layout, **{**SOFT, **values})
    sample(add_edit(patched, look), **{"size": SIZE, "batch": 2, **(run or {})})
    return look


def check(seen: Seen, maps: dict[tuple[int, ...], Tensor], length: int, fade: float | None = None) -> None:
    """The output is Eq. 7 in float64, with these maps M_s (height, width) on these tokens of a prompt of `length`."""
    call = seen.call
    logits = dense.logits_of(call.query, call.key[:, :length], call.heads)
    weights = torch.zeros(math.prod(call.grid), length, dtype=torch.float64)
    for tokens, values in maps.items():
        weights[:, list(tokens)] = resampled(values, call.grid)[:, None]
    fade = math.log(1 + seen.sigma**2) if fade is None else fade
    bias = 0.2 * fade * logits.flatten(1).std(1)[:, None, None] * weights
    # A prompt that the host repeats weighs the same as once.
    right = dense.attention(call.query, call.key[:, :length], call.value[:, :length], call.heads, bias)
    torch.testing.assert_close(seen.output.double(), right, rtol=0, atol=1e-5)
    without = dense.attention(call.query, call.key, call.value, call.heads)
    assert not maps or fade < 0.1 or difference(right, without) > 0.001
    assert not maps or call.bias_of().shape == (len(call.query), *call.query.shape[1:2], *call.key.shape[1:2])


def valued(shown: Tensor, irrelevant: Tensor) -> Tensor:
    return torch.where(shown, 2.5, torch.where(irrelevant, -3.0, 0.0))


OUTSIDE = {(2, 3): valued(LEFT, ~LEFT), (5,): valued(RIGHT, ~RIGHT)}


def test_phrases_are_found_once_for_all_layers(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each of the two known phrases, once a step."""
    found = []
    placed = Chunk.placed
    monkeypatch.setattr(Chunk, "placed", lambda chunk, spans: found.append(spans) or placed(chunk, spans))
    look = looked_at(model, run={"steps": 3})
    assert len(found) == 2 * 3 < len(look.of("positive"))


@pytest.mark.parametrize(
    ("values", "maps", "fade"),
    [
        ({}, OUTSIDE, None),
        ({"eta": "constant"}, OUTSIDE, 1.0),
        ({"weaken": "other regions"}, {(2, 3): valued(LEFT, RIGHT), (5,): valued(RIGHT, LEFT)}, None),
    ],
    ids=["the authors' code", "constant", "the paper's regions, which overlap"],
)
def test_equation_7(
    values: dict[str, Any], maps: dict[tuple[int, ...], Tensor], fade: float | None, model: Any
) -> None:
    look = looked_at(model, **values)
    assert len(look.of("positive")) == len(look.of("negative")) == 2 * len(look.sites)
    for seen in look.of("positive"):
        check(seen, maps, 7, fade)
    for seen in look.of("negative"):
        assert not seen.amended
        check(seen, {}, 7)


def test_regions_of_one_phrase_add_up_and_tokens_of_two_phrases_take_both(model: Any) -> None:
    both = Layout(WIDTH, HEIGHT, (Region("subject", LEFT), Region("SUBJECT", RIGHT)))
    for seen in looked_at(model, both).of("positive"):
        check(seen, {(2, 3): valued(LEFT | RIGHT, ~(LEFT | RIGHT))}, 7)
    nested = known_prompt(**{SPANS_KEY: {"subject": ((2, 4), (6, 7)), "scene": ((3, 4),)}})
    for seen in looked_at(model, run={"positive": nested}).of("positive"):
        check(seen, {(2, 6): valued(LEFT, ~LEFT), (3,): valued(LEFT | RIGHT, ~(LEFT | RIGHT))}, 7)


@pytest.mark.parametrize(("length", "other"), [(7, 21), (21, 7), (154, 77), (154, 9)])
def test_long_prompts_and_prompts_of_unequal_length(length: int, other: int, model: Any) -> None:
    token = length - 2
    known = known_prompt(1, length, **{SPANS_KEY: {"subject": ((2, 4), (token, token + 1)), "scene": ()}})
    look = looked_at(model, run={"positive": known, "negative": prompt(2, other)})
    repeated = math.lcm(length, other) if math.lcm(length, other) <= 4 * min(length, other) else length
    for seen in look.of("positive"):
        assert seen.call.key.shape[1] == repeated
        check(seen, {(2, 3, token): valued(LEFT, ~LEFT)}, length)


def test_area_conditioning_sees_its_part_of_the_layout(model: Any) -> None:
    (tokens, values), *_ = known_prompt()
    area = [[tokens, {**values, "area": (4, 6, 2, 3)}]]
    look = looked_at(model, run={"positive": [*known_prompt(4), *area]})
    part = {tokens: values[16:48, 24:72] for tokens, values in OUTSIDE.items()}
    found = [seen for seen in look.of("positive") if seen.call.chunk.area is not None]
    assert len(found) == 2 * len(look.sites)
    for seen in look.of("positive"):
        check(seen, OUTSIDE if seen.call.chunk.area is None else part, 7)


def test_the_statistic_of_a_batch(model: Any) -> None:
    alone = sample(laid_out(model, OVERLAPPING, **SOFT), size=SIZE)
    for statistics, same in (("per picture", True), ("whole batch", False)):
        patched = laid_out(model, OVERLAPPING, **SOFT, statistics=statistics)
        together = sample(patched, size=SIZE, batch=2)[:1]
        assert (difference(together, alone) < 2e-5) == same


def test_a_hard_weight_hides_a_phrase_from_everything_outside(model: Any) -> None:
    for seen in looked_at(model, hard_mask=True).of("positive"):
        outside = resampled((~LEFT).float(), seen.call.grid) > 0
        shares = seen.call.probabilities()[:, :, outside, 2:4]
        assert len(shares.flatten())
        assert shares.max() == 0


def test_nothing_to_weigh_changes_no_bit(model: Any) -> None:
    plain = sample(model)
    for values in ({"guidance_weight": 0.0}, {"positive_weight": 0.0, "negative_weight": 0.0}):
        assert torch.equal(sample(laid_out(model, OVERLAPPING, **values)), plain)
    # Nothing is known to be wrong with a prompt whose phrases no layout asks for.
    assert torch.equal(sample(laid_out(model, Layout(8, 8)), positive=prompt(1)), plain)


def test_prompts_that_do_not_know_the_phrase(model: Any) -> None:
    patched = laid_out(model, OVERLAPPING)
    with pytest.raises(ValueError, match="does not say which of its words are 'subject'; make it with Encode Prompt"):
        sample(patched, positive=prompt(1))
    # Only the negative prompt knows it, which is not conditioned.
    with pytest.raises(ValueError, match="does not say"):
        sample(patched, positive=prompt(1), negative=known_prompt())
    with pytest.raises(ValueError, match=r"phrase 'Scene ' is none of those .* \(subject\); add it to the phrases"):
        sample(patched, positive=prompt(1, **{SPANS_KEY: {"subject": ((2, 4),)}}))
    # Of several prompts, each may know some.
    one, other = (prompt(1, **{SPANS_KEY: {name: ((2, 4),)}}) for name in ("subject", "scene"))
    assert difference(sample(patched, positive=[*one, *other]), sample(model, positive=[*one, *other])) > 0.01
