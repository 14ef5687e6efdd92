"""Packs that change the rows or the prompt's tokens inside attention layers, or call the slots in ways of their own."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.parts.sites import Site
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared.look import Look
from subject_patches.tests.shared.mechanisms import MECHANISMS, Mechanism, over_mechanisms
from subject_patches.tests.shared.models import difference, sample
from subject_patches.tests.shared.peers import couple, with_tokens
from torch import Tensor

FEW = 0.003
# Those that read attention to the prompt's words.
READING = ("layout bias", "dual branch", "two references routed by maps")
UNTOLD = ("attn_precision", "n_heads", "dim_head", "activations_shape")


def named(name: str) -> Mechanism:
    return next(mechanism for mechanism in MECHANISMS if mechanism.name == name)


@pytest.mark.parametrize("name", [*READING, "recycled self-attention"])
@pytest.mark.parametrize("batch", [1, 2])
def test_beside_an_attention_couple(name: str, batch: int, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    mechanism = named(name)
    caplog.set_level(logging.WARNING)
    result = sample(couple(mechanism.on(model), 2), batch=batch, steps=3)
    assert torch.equal(sample(mechanism.on(couple(model, 2)), batch=batch, steps=3), result)
    assert difference(result, sample(couple(model, 2), batch=batch, steps=3)) > FEW
    assert not caplog.records
    if batch == 2:
        alone = sample(couple(mechanism.on(model), 2), steps=3, seed=6)
        assert difference(result[1:], alone) < 2e-5


def test_a_couples_own_prompt_is_laid_out_and_its_regions_are_not(model: Any) -> None:
    """In one layer: rows of the chunk's own prompt get the bias that they get without the couple."""
    site = Site("cross", "input", 1, 0)
    mechanism = named("layout bias")
    seen = []
    for patch in (lambda target: target, lambda target: couple(target, 2)):
        look = Look(frozenset({site}), Window())
        sample(patch(add_edit(mechanism.on(model), look)), steps=1)
        seen.append([each.call for each in look.seen if each.call.chunk.conditioned])
    (alone,), (own, *regions) = seen
    assert torch.equal(own.bias_of(), alone.bias_of())
    assert len(regions) == 2
    assert all(call.bias_of() is None for call in regions)


@pytest.mark.parametrize("name", READING)
@pytest.mark.parametrize("tokens", ["appended", "put before", "doubled", "halved"])
def test_prompts_whose_tokens_another_pack_changes(
    tokens: str, name: str, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    mechanism = named(name)
    caplog.set_level(logging.WARNING)
    theirs = sample(with_tokens(model, tokens), steps=3)
    result = sample(with_tokens(mechanism.on(model), tokens), steps=3)
    assert difference(result, theirs) > FEW
    assert not caplog.records
    if tokens == "doubled":
        # Attention over all tokens twice is attention over them once.
        assert difference(theirs, sample(model, steps=3)) < 2e-5
        assert difference(result, sample(mechanism.on(model), steps=3)) < 2e-5


def test_tokens_that_nobody_knows_are_told_once_by_the_nodes_names(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    both = named("dual branch").on(named("layout bias").on(model))
    assert torch.equal(sample(with_tokens(both, "pooled"), steps=3), sample(with_tokens(model, "pooled"), steps=3))
    (record,) = caplog.records
    for words in ("Layout Bias in 7", "Dual-Branch Integration in 7", "the tokens of its prompt"):
        assert words in record.getMessage()


# A transformer block of another pack's, which calls the slots in its own way


def with_blocks(model: Any, again: bool) -> Any:
    """The host's slots called without what the host tells of a layer; with `again` a second time for the last rows."""

    def around(options: dict[str, Any]) -> dict[str, Any]:
        slots = {
            name: {place: partial(called, patch) for place, patch in slot.items()}
            for name, slot in options.get("patches_replace", {}).items()
        }
        return {**options, "patches_replace": slots}

    def called(patch: Any, query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> Tensor:
        told = {name: value for name, value in extra.items() if name not in UNTOLD}
        output = patch(query, key, value, told)
        if again and len(query) > 1:
            half = len(query) // 2
            part = patch(query[half:], key[half:], value[half:], told)
            output = torch.cat([output[:half], 0.5 * output[half:] + 0.5 * part])
        return output

    def wrapper(executor: Any, *args: Any, **rest: Any) -> Tensor:
        *others, options = args
        return executor(*others, around(options), **rest)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    return clone


@over_mechanisms
def test_slots_called_with_less_and_for_some_rows_again(
    mechanism: Mechanism, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    exact = sample(mechanism.on(model), batch=2)
    assert difference(sample(with_blocks(mechanism.on(model), again=False), batch=2), exact) < 2e-5
    twice = sample(with_blocks(mechanism.on(model), again=True), batch=2)
    assert difference(twice, sample(with_blocks(model, again=True), batch=2)) > FEW
    assert not caplog.records
