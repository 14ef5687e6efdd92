"""Transformers: what runs through the host's attention override, against computations written apart from the pack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from subject_patches.nodes.recycled_attention import reference_streams
from subject_patches.patches.edit import Edit, Request
from subject_patches.patches.engine import add_edit
from subject_patches.patches.families import attention_sites, family_of
from subject_patches.patches.layout_regions import Layout, Region
from subject_patches.patches.subject import Subject
from subject_patches.patches.window import Window
from subject_patches.tests.dense_dit import ByHand
from subject_patches.tests.dit_models import dit_model
from subject_patches.tests.mechanisms import left_half
from subject_patches.tests.models import (
    difference,
    frames_of,
    integrated,
    known_prompt,
    laid_out,
    map_router,
    recycled,
    reference,
    routed,
    sample,
    second_context,
    subject,
)

SIZE = (8, 10)


@pytest.fixture(scope="module", params=["FLUX.1", "Chroma", "FLUX.2", "Qwen-Image", "Qwen-Image-Edit", "SD 3.5"])
def model(request: Any) -> Any:
    return dit_model(request.param)


def subject_for(model: Any, seed: int = 0, **values: Any) -> Subject:
    channels = model.model.latent_format.latent_channels
    return subject(reference(seed, channels=channels, frames=frames_of(model)), seed=seed, **values)


@dataclass(frozen=True, eq=False)
class Watch(Edit):
    """Records a companion at every layer, looks at every call, and amends nothing."""

    stream: Any

    def requests(self, sigma: float) -> list[Request]:
        return [(self.stream, self.sites, ("query", "key", "value", "output"))]


def test_a_companion_that_is_only_recorded_changes_no_bit(model: Any) -> None:
    (stream,) = reference_streams(model, subject_for(model), 0, None)
    watch = Watch(frozenset(attention_sites(model)), Window(), stream)
    assert torch.equal(sample(add_edit(model, watch), size=SIZE), sample(model, size=SIZE))


@pytest.mark.parametrize("batch", [1, 2])
def test_recycled_attention_is_the_dense_one(model: Any, batch: int) -> None:
    who = subject_for(model)
    positive = known_prompt(**second_context(model, 1))
    given = {"size": SIZE, "batch": batch, "positive": positive}
    by_hand = model.clone()
    override = ByHand(model, who, positive, SIZE, family_of(model).patch)
    by_hand.model_options["transformer_options"]["optimized_attention_override"] = override
    expected = sample(by_hand, **given)
    assert difference(sample(recycled(model, (who,), sites="usual"), **given), expected) < 1e-5
    assert difference(expected, sample(model, **given)) > 0.01


def test_tmp_mechs(model: Any) -> None:
    half = left_half()[0] > 0
    layout = Layout(30, 20, (Region("subject", half), Region("scene", ~half)))
    plain = sample(model)
    print()
    print("layout", difference(sample(laid_out(model, layout)), plain))
    two = (subject_for(model), subject_for(model, 1, phrase="scene"))
    print("routed masks", difference(sample(routed(model, two, sites="usual")), plain))
    print("routed maps", difference(sample(routed(model, two, map_router(), sites="usual")), plain))
    print("dual", difference(sample(integrated(model)), plain))
