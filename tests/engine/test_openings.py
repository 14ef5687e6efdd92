"""Transformers: what runs through the host's attention override, against computations written apart from the pack."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.sample
import pytest
import torch
from subject_patches.nodes.references import reference_streams
from subject_patches.patches.engine.attention import Attention
from subject_patches.patches.engine.call import BATCH, PLACES, AttentionCall
from subject_patches.patches.engine.chunk import Chunk
from subject_patches.patches.engine.edit import Edit, Request
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.engine.openings import Opening
from subject_patches.patches.engine.session import Forward, Session
from subject_patches.patches.families import attention_sites, family_of
from subject_patches.patches.mechanisms.layout_regions import Layout, Region
from subject_patches.patches.parts.prompt import SPANS_KEY
from subject_patches.patches.parts.window import Levels, Window
from subject_patches.tests.shared import dense
from subject_patches.tests.shared.dense_dit import ByHand, begins_at
from subject_patches.tests.shared.dit_models import PATCHED, dit_model
from subject_patches.tests.shared.look import Acting
from subject_patches.tests.shared.mechanisms import left_half
from subject_patches.tests.shared.models import (
    difference,
    generator,
    known_prompt,
    laid_out,
    prompt,
    recycled,
    sample,
    second_context,
    subject_for,
)
from torch import Tensor

SIZE = (8, 10)


@pytest.fixture(scope="module", params=PATCHED)
def model(request: Any) -> Any:
    return dit_model(request.param)


@dataclass(frozen=True, eq=False)
class Watch(Edit):
    """Records a companion at every layer, looks at every call, and amends nothing."""

    stream: Any

    def requests(self, sigma: float) -> list[Request]:
        return [(self.stream, self.sites, ("query", "key", "value", "output"))]


def test_a_companion_that_is_only_recorded_changes_no_bit(model: Any) -> None:
    (stream,) = reference_streams(model, subject_for(model), 0, None)
    sites = frozenset(site for site in attention_sites(model) if site.kind != "cross")
    watch = Watch(sites, Window(), stream)
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
    assert difference(sample(recycled(model, (who,), sites="usual", noise_level="current"), **given), expected) < 1e-5
    assert difference(expected, sample(model, **given)) > 0.01


def looked(model: Any, act: Callable[[AttentionCall], None], **given: Any) -> list[AttentionCall]:
    """The calls of a run of one step, each as `act` amended it."""
    look = Acting(frozenset(attention_sites(model)), Window(), act)
    sample(add_edit(model, look), size=SIZE, steps=1, **given)
    return look.seen


def test_a_call_has_the_pictures_queries_over_all_keys(model: Any) -> None:
    calls = looked(model, lambda call: None, positive=known_prompt(**second_context(model, 1)))
    sites = attention_sites(model)
    assert [call.site for call in calls] == list(sites)
    count = math.prod(family_of(model).grid(SIZE))
    for call in calls:
        assert math.prod(call.grid) == call.query.shape[1] == count
        if call.site.kind == "joint":
            begins = begins_at(model, call.key.shape[1], count)
            assert call.own == slice(begins, begins + count)
            first = count if begins == 0 else 0
            assert call.prompt == slice(first, first + call.chunk.length)
            # Keys of the prompt's own tokens, where the host fills it up from the left; HiDream's are T5's.
            subject = 2 if begins == 0 else call.chunk.length - 5
            assert call.chunk.spans["subject"] == ((subject, subject + 2),)
        else:
            assert call.own is None
            assert call.prompt == (slice(0, call.chunk.length) if call.site.kind == "cross" else None)


def test_keys_take_the_place_of_the_pictures_own(model: Any) -> None:
    """Of a bias, an extension and other keys for the picture, against the dense attention."""
    results: list[tuple[Tensor, Tensor]] = []

    def act(call: AttentionCall) -> None:
        if call.site.kind == "cross":
            return
        source = generator(len(results))
        more = torch.randn(2, 1, 5, call.key.shape[-1], generator=source)
        own = call.own or slice(0, call.key.shape[1])
        if call.prompt is not None:
            call.bias(
                torch.randn(1, call.query.shape[1], 3, generator=source),
                [call.prompt.start, call.prompt.start + 1, call.prompt.stop - 1],
            )
        expected = [
            torch.cat([whole[:, : own.start], part, whole[:, own.stop :]], 1)
            for whole, part in zip((call.key, call.value), more, strict=True)
        ]
        call.replace(key=more[0], value=more[1])
        assert torch.equal(call.key, expected[0])
        assert torch.equal(call.value, expected[1])
        call.extend(*more.flip(2))
        expected = dense.attention(call.query, call.key, call.value, call.heads, call.bias_of(), call.extensions)
        call.blend(lambda output: results.append((output, expected)) or output)

    looked(model, act)
    assert results
    for output, expected in results:
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


def test_the_prompts_part_of_an_output(model: Any) -> None:
    if all(site.kind != "joint" for site in attention_sites(model)):
        pytest.skip("prompt and picture are attended to apart")
    results: list[tuple[Tensor, Tensor, Tensor]] = []

    def act(call: AttentionCall) -> None:
        if call.site.kind != "joint":
            return
        call.extend(call.key[:, :4], call.value[:, :4])
        shares = dense.shares(call.query, call.key, call.heads, call.bias_of(), call.extensions)[..., call.prompt]
        part = (shares @ dense.split(call.value[:, call.prompt], call.heads)).transpose(1, 2).flatten(2)
        whole = dense.attention(call.query, call.key, call.value, call.heads, call.bias_of(), call.extensions)
        call.blend_prompt(lambda output: results.append((output, part, whole)) or 3 * output)
        call.blend(lambda output: results.append((output, whole + 2 * part, whole)) or output)

    looked(model, act)
    assert results
    for output, expected, whole in results:
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
        assert difference(output.double(), whole) > 0.01


def test_hidreams_prompt_stands_there_twice() -> None:
    """T5's 7 tokens, then Llama's 9 of its last layer, then as many of a layer for the block."""
    model = dit_model("HiDream")
    positive = known_prompt(**{**second_context(model, 1), SPANS_KEY: {"subject": ((2, 4), (9, 11))}})
    calls = looked(model, lambda call: None, positive=positive)
    assert len(calls) == len(attention_sites(model))
    for call in calls:
        assert call.prompt.stop - call.prompt.start == call.chunk.length == 7 + 9 + 9
        assert call.chunk.spans == {"subject": ((2, 4), (9, 11), (18, 20))}


def test_hidreams_pictures_to_edit_are_refused() -> None:
    model = dit_model("HiDream")
    shown = {"concat_latent_image": torch.zeros(1, 16, *SIZE), **second_context(model, 1)}
    with pytest.raises(ValueError, match="This prompt shows HiDream a picture to edit, whose tokens lie among"):
        sample(recycled(model, (subject_for(model),)), size=SIZE, positive=known_prompt(**shown))


def test_keys_that_krea_repeats_are_kept_once() -> None:
    """Two of its four heads share a key. In the cache that a subject has, and the same picture from it."""
    model = dit_model("Krea 2")
    who, attention = subject_for(model), model.model.diffusion_model.blocks[0].attn
    patched = recycled(model, (who,))
    first = sample(patched, steps=1)
    (features,) = (entry.features for entry in who.cache._entries.values())
    assert len(features) == len(attention_sites(model))
    for kept in features.values():
        for part in ("key", "value"):
            assert kept[part].shape[-1] == attention.kvheads * attention.headdim == 2 * 64
    assert who.cache.size == sum(2 * kept["key"].numel() * 4 for kept in features.values())
    assert torch.equal(sample(patched, steps=1), first)


@pytest.mark.parametrize("name", ["Wan", "Qwen-Image"])
def test_videos_are_refused(name: str) -> None:
    model = dit_model(name)
    noise = torch.zeros(1, 16, 5, 8, 8)
    patched = recycled(model, (subject_for(model),))
    with pytest.raises(ValueError, match=r"This run makes 5 frames, but .* work on pictures; set the length"):
        comfy.sample.sample(
            patched, noise, 1, 1.0, "euler", "normal", known_prompt(), known_prompt(2), noise, disable_pbar=True
        )


def test_prompts_on_several_gpus_are_refused() -> None:
    """A copy of the model on each, as MultiGPU CFG Split hangs them on it where there are several."""
    split = dit_model("FLUX.1")
    split.set_additional_models("multigpu", [split.clone()])
    with pytest.raises(ValueError, match=r"prompts are split over 2 GPUs, but .* on one; bypass MultiGPU CFG Split"):
        sample(recycled(split, (subject_for(split),)))


def test_a_mask_of_truth_values_is_a_bias_of_the_queries_type() -> None:
    query = torch.zeros(1, 2, 4, dtype=torch.float16)
    attention = Attention(torch.add, None, (query, query, query, 1), {"mask": torch.tensor([[True, False]])})
    bias = attention.bias(slice(0, 1), slice(0, 2))
    assert bias.dtype == torch.float16
    assert bias.flatten().tolist() == [0.0, -math.inf]


class Named(Edit):
    """One that warnings name."""

    node = "A node"


def test_it_is_told_what_another_pack_changed(caplog: pytest.LogCaptureFixture) -> None:
    model = dit_model("HiDream")
    family, sites = family_of(model), attention_sites(model)
    session = Session((Named(frozenset(sites), Window()),), "tests", family, Levels())
    session.active = session.edits
    chunk = Chunk(slice(0, 1), "positive", True, {}, SIZE)
    opening = Opening(session, family, sites, Forward(1, (chunk,), frozenset(sites)), None, SIZE, 7, 1, None)
    count = math.prod(family.grid(SIZE)) + 7
    for rows, tokens in ((1, count - 1), (2, count)):
        query = torch.zeros(rows, tokens, 8)
        opening(lambda q, *_, **__: q, query, query, query, 2)
    with caplog.at_level(logging.WARNING):
        session.warn_of_left()
    assert f"A node in 1 ({BATCH} changed); A node in 1 ({PLACES} changed)" in caplog.text


def test_the_context_of_animas_adapter() -> None:
    """Of its T5 tokens, filled up to 512, whatever the text encoder's are."""
    model = dit_model("Anima", crossattn_emb_channels=1024)
    numbers = {"t5xxl_ids": torch.arange(20, 29), "t5xxl_weights": torch.ones(9)}
    given = {"positive": known_prompt(width=1024, **numbers), "negative": prompt(2, width=1024, **numbers)}
    calls = looked(model, lambda call: None, **given)
    assert {call.chunk.length for call in calls} == {512}
    assert all(call.prompt == slice(0, 512) for call in calls if call.site.kind == "cross")
    halves = Layout(30, 20, (Region("subject", left_half()[0] > 0),))
    assert difference(sample(laid_out(model, halves), **given), sample(model, **given)) > 1e-3
