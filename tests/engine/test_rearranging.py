"""Packs that change rows or tokens of a transformer's joint attention, on the models that have openings for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hosting.random_models import SMALL_CONTEXT
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.engine.rearranging import Rearranging
from subject_patches.patches.families import attention_sites
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared.dit_models import dit_model
from subject_patches.tests.shared.look import Look
from subject_patches.tests.shared.mechanisms import MECHANISMS, Mechanism
from subject_patches.tests.shared.models import difference, generator, known_prompt, randn, sample, subject_for
from torch import Tensor

FEW = 1e-3
NAMES = ("recycled self-attention", "soft layout bias", "dual branch")
CHOSEN = [each for each in MECHANISMS if each.name in NAMES]
Patch = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module", params=["FLUX.1", "Krea 2"])
def model(request: pytest.FixtureRequest) -> Any:
    return dit_model(request.param)


@pytest.fixture(scope="module", params=["FLUX.1", "Qwen-Image"])
def longer(request: pytest.FixtureRequest) -> Any:
    """A model whose prompt may have more tokens behind the inputs. The host counts Krea 2's before."""
    return dit_model(request.param)


def couple(model: Any, other: bool = True) -> Any:
    """The conditioned rows once more, with another prompt's keys, or with the same one's; the two halves of the picture
    are of one each."""
    state: dict[str, Any] = {}

    def widen(query: Tensor, key: Tensor, value: Tensor, *, extra_options: Any, pe: Any, **_: Any) -> dict[str, Any]:
        kinds, text = extra_options["cond_or_uncond"], extra_options["img_slice"][0]
        size = len(query) // len(kinds)
        rows = [n * size + row for n, kind in enumerate(kinds) for row in [*range(size)] * (1 if kind else 2)]
        state["kinds"], state["size"] = kinds, size
        query, key, value = query[rows], key[rows], value[rows]
        if other:
            key = key.clone()
            first = 0
            for kind in kinds:
                if not kind:
                    key[first + size : first + 2 * size, :, :text] *= -1
                first += size * (1 if kind else 2)
        return {"q": query, "k": key, "v": value, "pe": pe[rows] if len(pe) > 1 else pe}

    def mix(output: Tensor, extra: Any) -> Tensor:
        parts, results = list(output.split(state["size"])), []
        for kind in state["kinds"]:
            own = parts.pop(0)
            if not kind:
                half = torch.arange(own.shape[1]) % 2 == 0
                own = torch.where(half[:, None], own, parts.pop(0))
            results.append(own)
        return torch.cat(results)

    clone = model.clone()
    clone.set_model_patch(widen, "attn1_patch")
    clone.set_model_patch(mix, "attn1_output_patch")
    return clone


def with_tokens(model: Any, before: bool) -> Any:
    """Three more keys, before the prompt or at the end, that a rotation of places leaves as they are."""

    def change(query: Tensor, key: Tensor, value: Tensor, *, pe: Tensor, **_: Any) -> dict[str, Any]:
        stays = torch.zeros_like(pe[:, :, :1]).expand(-1, -1, 3, *pe.shape[3:]).clone()
        stays[..., 0, 0] = stays[..., 1, 1] = 1

        def joined(one: Tensor, other: Tensor) -> Tensor:
            return torch.cat([other, one] if before else [one, other], 2)

        def longer(tokens: Tensor) -> Tensor:
            more = torch.randn((1, tokens.shape[1], 3, tokens.shape[3]), generator=generator(7))
            return joined(tokens, more.expand(len(tokens), -1, -1, -1))

        # The host turns queries and keys by one table, so that both are longer.
        return {"q": longer(query), "k": longer(key), "v": longer(value), "pe": joined(pe, stays)}

    def cut(output: Tensor, extra: Any) -> Tensor:
        return output[:, 3:] if before else output[:, :-3]

    clone = model.clone()
    clone.set_model_patch(change, "attn1_patch")
    clone.set_model_patch(cut, "attn1_output_patch")
    return clone


@pytest.mark.parametrize("mechanism", CHOSEN, ids=lambda each: each.name)
def test_beside_a_couple(mechanism: Mechanism, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    subjects = (subject_for(model),)
    result = sample(couple(mechanism.on(model, subjects)))
    assert torch.equal(sample(mechanism.on(couple(model), subjects)), result)
    assert difference(result, sample(couple(model))) > FEW
    # A couple of one prompt is no couple.
    same = sample(couple(mechanism.on(model, subjects), other=False))
    assert difference(same, sample(mechanism.on(model, subjects))) < 1e-5
    assert difference(result, same) > FEW
    assert not caplog.records


def test_a_couples_own_prompt_is_known_and_the_other_is_not(model: Any) -> None:
    layout = next(each for each in CHOSEN if "layout" in each.name)
    look = Look(frozenset(attention_sites(model)), Window())
    sample(couple(add_edit(layout.on(model), look)), steps=1)
    calls = [each.call for each in look.seen if each.call.chunk.conditioned]
    own, others = calls[::2], calls[1::2]
    assert len(own) == len(others) == len(attention_sites(model))
    assert all(call.bias_of() is not None for call in own)
    assert all(one.chunk.rows.stop == other.chunk.rows.start for one, other in zip(own, others, strict=True))
    assert all(call.bias_of() is None and call.prompt is None and not call.chunk.spans for call in others)


@pytest.mark.parametrize("before", [False, True], ids=["behind", "before"])
@pytest.mark.parametrize("mechanism", CHOSEN, ids=lambda each: each.name)
def test_beside_more_tokens(mechanism: Mechanism, before: bool, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    subjects = (subject_for(model),)
    look = Look(frozenset(attention_sites(model)), Window())
    result = sample(with_tokens(mechanism.on(add_edit(model, look), subjects), before))
    assert difference(result, sample(with_tokens(model, before))) > FEW
    assert not caplog.records
    for call in (each.call for each in look.seen):
        assert call.prompt.start == 3 * before
        assert call.own.start >= call.prompt.stop
        assert call.key.shape[1] >= call.own.stop + (0 if before else 3)


def behind_the_inputs(model: Any, join: Callable[[Tensor], Tensor]) -> Any:
    """Another text, as the host's USO Style Reference makes one, whose tokens have no places."""

    def patch(streams: dict[str, Any]) -> dict[str, Any]:
        text, ids = join(streams["txt"]), streams["txt_ids"]
        return {**streams, "txt": text, "txt_ids": ids.new_zeros(len(ids), text.shape[1], ids.shape[2])}

    clone = model.clone()
    clone.set_model_post_input_patch(patch)
    return clone


def style(text: Tensor) -> Tensor:
    more = torch.randn((1, 3, text.shape[2]), generator=generator(7))
    return more.expand(len(text), -1, -1)


@pytest.mark.parametrize("before", [False, True], ids=["behind", "before"])
def test_the_prompt_is_found_beside_tokens_behind_the_inputs(before: bool, longer: Any) -> None:
    """The keys that change with the prompt are its own."""
    keys = []
    for seed in (1, 2):
        look = Look(frozenset(attention_sites(longer)), Window())
        joined = behind_the_inputs(
            add_edit(longer, look),
            lambda text: torch.cat([style(text), text] if before else [text, style(text)], 1),
        )
        ((_, values),) = known_prompt()
        sample(joined, positive=[[randn(1, 7, SMALL_CONTEXT, seed=seed), values]], cfg=1.0, steps=1)
        keys.append(look.seen[0].call.key)
    (found,) = {(each.call.prompt.start, each.call.prompt.stop) for each in look.seen}
    changed = (keys[0] != keys[1]).any(-1)[0].nonzero().flatten().tolist()
    assert changed == list(range(*found))
    assert all(each.call.own.start == 10 for each in look.seen)


def test_a_prompt_that_is_cut_behind_the_inputs(longer: Any, caplog: pytest.LogCaptureFixture) -> None:
    layout = next(each for each in CHOSEN if "layout" in each.name)
    results = [sample(behind_the_inputs(each, lambda text: text[:, 1:])) for each in (layout.on(longer), longer)]
    assert torch.equal(*results)
    (told,) = {record.getMessage() for record in caplog.records if record.levelno == logging.WARNING}
    assert f"Layout Bias in {len(attention_sites(longer))} (the tokens of its prompt changed)" in told


def test_a_prompt_that_grew_before_its_projection(caplog: pytest.LogCaptureFixture) -> None:
    """In Anima and Cosmos: nobody knows which of the keys are the prompt's, and the node is named."""
    model = dit_model("Cosmos-Predict2")
    layout = next(each for each in CHOSEN if "layout" in each.name)

    def grow(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> dict[str, Any]:
        key = torch.cat([key[:, -3:] * 0.5, key], 1)
        return {"k": key, "v": key}

    grown, patched = model.clone(), layout.on(model)
    for each in (grown, patched):
        each.set_model_patch(grow, "attn2_patch")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(sample(patched), sample(grown))
    (told,) = {record.getMessage() for record in caplog.records}
    assert "Layout Bias in 2 (the tokens of its prompt changed)" in told


def test_what_cannot_be_told() -> None:
    """A picture whose tokens were merged."""

    def merge(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> dict[str, Any]:
        return {"k": torch.cat([key[:, :, :-9], key[:, :, -4:] * 0.5], 2), "v": value[:, :, :-5]}

    around = Rearranging(count=12, context=7)
    query, key = (torch.randn(2, 2, 19, 4, generator=generator(seed)) for seed in (1, 2))
    given = {"extra_options": {"img_slice": [7, 19]}}
    around.first(query, key, **given)
    around.last(query, merge(query, key, key)["k"], **given)
    assert around.lost
    assert around.change is None
    # And the next layer is not held to it.
    around.first(query, key, **given)
    around.last(query, key, **given)
    assert not around.lost
