"""Multi-Source Attention Swap: what a run does and costs, and bad input."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingSD3
from subject_patches.nodes.retouch import MultiSourceSwapNode
from subject_patches.nodes.trajectory import InvertToTrajectoryNode
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.families import attention_sites
from subject_patches.patches.mechanisms.blend_mask import AdaptiveMask
from subject_patches.patches.parts.cache import MEGABYTE, FeatureCache
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared.layouts import box
from subject_patches.tests.shared.look import Look
from subject_patches.tests.shared.models import (
    counted,
    difference,
    inputs_of,
    known_prompt,
    prompt,
    randn,
    sample,
    swapped,
    trajectory,
)
from torch import Tensor

ROUNDING = 2e-5


def test_the_mask_blends_the_layouts_output(model: Any) -> None:
    """Where a plain mask is 0 the output of self-attention is the layout's, with the prompt it was given."""
    mask = box(8, 8, 0, 0, 4, 8).float()[None]
    layout = trajectory(randn(1, 4, 8, 8, seed=1))
    sites = frozenset(s for s in attention_sites(model) if s.kind == "self" and s.key == ("output", 3, 0))
    look = Look(sites, Window())
    patched = swapped(
        model, layout, layout_conditioning=prompt(31), lambda2=0.0, mask_blend_start=0.0, blend_mask=mask,
        sites="named", named_sites="output.3",
    )  # fmt: skip
    sample(add_edit(patched, look))
    state = layout.stream.latents(look.of("positive")[0].sigma, None)
    sigma = torch.tensor([look.of("positive")[0].sigma])
    kept: list[Tensor] = []

    def keep(query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> Tensor:
        from comfy.ldm.modules.attention import optimized_attention

        kept.append(optimized_attention(query, key, value, extra["n_heads"]))
        return kept[-1]

    options = {"patches_replace": {"attn1": {("output", 3, 0): keep}}}
    with torch.inference_mode():
        model.model.apply_model(state, sigma, c_crossattn=prompt(31)[0][0], transformer_options=options)
    places = mask.flatten() == 0
    seen = look.of("positive")[0]
    assert difference(seen.output[:, places], kept[0][:, places]) < ROUNDING
    assert difference(seen.output[:, ~places], kept[0][:, ~places]) > 0.01


def fresh(*seeds: int) -> list[Any]:
    return [trajectory(randn(1, 4, 8, 8, seed=seed)) for seed in seeds]


MASK = AdaptiveMask(box(30, 20, 6, 4, 22, 15).float()[None], "subject")


@pytest.mark.parametrize(("apply_to", "each"), [("both", 2), ("cond only", 1)])
def test_what_it_costs(apply_to: str, each: int, model: Any) -> None:
    """Two of ten steps run the layout, the others the reference, and the last four both; the next picture none."""
    rows: list[int] = []
    patched = counted(swapped(model, *fresh(1, 2), blend_mask=MASK, apply_to=apply_to), rows)
    first = sample(patched, steps=10)
    assert sum(rows) == 20 + each * (10 + 4)
    again = sample(patched, steps=10, seed=6)
    assert sum(rows) == 20 + each * (10 + 4) + 20
    assert torch.equal(sample(patched, steps=10), first)
    assert not torch.equal(again, first)


def test_nothing_is_run_for_a_prompt_that_is_left_out(model: Any) -> None:
    """At CFG 1 the host leaves the negative prompt out."""
    rows: list[int] = []
    sample(counted(swapped(model, *fresh(1, 2), blend_mask=MASK), rows), steps=10, cfg=1.0)
    assert sum(rows) == 10 + 10 + 4


def test_a_cache_too_small_changes_nothing(model: Any) -> None:
    layout, reference = fresh(1, 2)
    right = sample(swapped(model, layout, reference, blend_mask=MASK), steps=4)
    for megabytes in (0, 0.2):
        small = [replace(t, cache=FeatureCache(int(megabytes * MEGABYTE))) for t in (layout, reference)]
        patched = swapped(model, *small, blend_mask=MASK)
        assert torch.equal(sample(patched, steps=4), right)
        assert torch.equal(sample(patched, steps=4), right)


def test_each_prompt_has_features_of_its_own(model: Any) -> None:
    """One trajectory with two prompts, in one cache: what one lends must not be given to the other."""
    layout, _ = fresh(1, 2)
    results = [
        sample(swapped(model, layout, lambda2=1.0, layout_conditioning=conditioning), steps=3)
        for conditioning in (prompt(31), prompt(32), prompt(31))
    ]
    assert difference(results[0], results[1]) > 0.003
    assert torch.equal(results[0], results[2])


def test_the_negative_prompt_lends_to_the_negative_chunk(model: Any) -> None:
    layout, _ = fresh(1, 2)
    patched = swapped(model, layout, lambda2=1.0, layout_conditioning=prompt(31, 9), sites="decoder")
    look = Look(frozenset(s for s in attention_sites(model) if s.kind == "cross" and s.stage != "encoder"), Window())
    sample(add_edit(patched, look), positive=known_prompt(1, 7), negative=prompt(2, 5))
    # The layout's prompt is of another length than the generation's; the negative chunk's own is the layout's too.
    for name, length in (("positive", 9), ("negative", 5)):
        assert {seen.call.key.shape[1] for seen in look.of(name)} == {length}
        assert all(seen.call.replaced == {"query", "key", "value"} for seen in look.of(name))


def test_cross_attention_may_keep_its_own(model: Any) -> None:
    layout, _ = fresh(1, 2)
    look = Look(frozenset(site for site in attention_sites(model) if site.stage != "encoder"), Window())
    patched = swapped(model, layout, lambda2=1.0, swap_cross_attention=False, sites="decoder")
    sample(add_edit(patched, look))
    for seen in look.seen:
        assert seen.call.replaced == ({"query", "key", "value"} if seen.call.site.kind == "self" else set())


def test_the_reference_is_read_with_a_prompt_of_its_own(model: Any) -> None:
    _, reference = fresh(1, 2)
    given, own, same = (
        sample(swapped(model, None, reference, lambda2=0.0, reference_conditioning=conditioning))
        for conditioning in (prompt(31), None, known_prompt())
    )
    assert difference(given, own) > 0.003
    assert torch.equal(same, own)


def test_masks_of_attention_in_a_run(model: Any) -> None:
    """A phrase's mask depends on the phrase, and on nothing but what the prompt says of it."""
    layout, reference = fresh(1, 2)
    results = {
        phrase: sample(
            swapped(model, layout, reference, lambda2=0.0, mask_blend_start=0.3, blend_mask=AdaptiveMask(None, phrase)),
            steps=5,
        )
        for phrase in ("subject", "scene", "Subject")
    }
    assert difference(results["subject"], results["scene"]) > 0.0003
    assert torch.equal(results["subject"], results["Subject"])
    with pytest.raises(ValueError, match=r"which of its words are the blend mask's 'dog' \(it knows subject, scene\)"):
        sample(swapped(model, layout, reference, blend_mask=AdaptiveMask(None, "dog")))


def test_the_stages_are_told(model: Any) -> None:
    layout, reference = fresh(1, 2)
    sites = frozenset(s for s in attention_sites(model) if s.kind == "self")
    look = Look(sites, Window())
    patched = swapped(model, layout, reference, blend_mask=MASK)
    sample(add_edit(patched, look), steps=6)
    notes = {note.name: note for seen in look.of("positive") for note in seen.call.notes}
    stages = notes["blend mask, stage by stage"]
    assert stages.labels == ("subject attention", "thresholded attention", "subject region", "adaptive mask")
    assert stages.maps().shape[1] == 4
    assert 0 <= notes["blend mask"].maps().min() <= notes["blend mask"].maps().max() <= 1


def test_an_area_is_told_its_part_of_the_stages(model: Any) -> None:
    layout, reference = fresh(1, 2)
    left = torch.zeros(1, 8, 8)
    left[:, :, :4] = 1
    told = {}
    for start in (0, 4):
        look = Look(frozenset(s for s in attention_sites(model) if s.kind == "self"), Window())
        patched = swapped(model, layout, reference, blend_mask=AdaptiveMask(left, ""))
        sample(add_edit(patched, look), steps=4, positive=prompt(1, area=(8, 4, 0, start)))
        notes = [n for seen in look.of("positive") for n in seen.call.notes if n.name == "blend mask, stage by stage"]
        assert notes
        told[start] = {float(value) for note in notes for value in note.maps().unique()}
    # The mask itself falls off towards its edge.
    assert min(told[0]) > 0.5
    assert told[4] == {0.0}


def test_a_velocity_model(model: Any) -> None:
    (velocity,) = ModelSamplingDiscrete().patch(model, "v_prediction", False)
    sigmas = comfy.samplers.calculate_sigmas(velocity.get_model_object("model_sampling"), "normal", 4)
    with torch.inference_mode():
        layout, reference = (
            InvertToTrajectoryNode.execute(
                velocity, {"samples": randn(1, 4, 8, 8, seed=n)}, sigmas, None, prompt(1)
            ).args[0]
            for n in (1, 2)
        )
    result = sample(swapped(velocity, layout, reference, blend_mask=MASK), steps=4)
    assert result.isfinite().all()
    assert difference(result, sample(velocity, steps=4)) > 0.003


def test_the_model_runs_on_the_kept_latents(model: Any) -> None:
    """At every noise level of the sampler, bit for bit, and not on what a replay would drift to."""
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)
    with torch.inference_mode():
        given = ({"samples": randn(1, 4, 8, 8)}, sigmas, None, prompt(1))
        layout = InvertToTrajectoryNode.execute(model, *given).args[0]
    patched = swapped(model, layout, lambda2=1.0)
    with inputs_of(model) as seen:
        sample(patched, steps=4, cfg=1.0)
    scaled = model.get_model_object("model_sampling").calculate_input
    assert len(seen) == 8
    # A layout's pass comes before the picture's.
    for call, sigma, state in zip(seen[::2], sigmas[:-1], layout.states[:-1], strict=True):
        assert torch.equal(call["x"], scaled(sigma[None], state))


@pytest.mark.parametrize("reference_keys", ["replace", "extend"])
def test_a_masked_reference_lends_its_subject(reference_keys: str, model: Any) -> None:
    """In a run: fewer keys at every layer, for both chunks; a mask of all is none; a layout's mask means nothing."""
    layout, reference = fresh(1, 2)
    mask = box(8, 8, 2, 2, 6, 6).float()[None]
    look = Look(frozenset(site for site in attention_sites(model) if site.kind == "self"), Window())
    given = {"lambda2": 0.0, "sites": "decoder", "reference_keys": reference_keys}
    patched = swapped(model, None, replace(reference, mask=mask), **given)
    some = sample(add_edit(patched, look))
    for seen in look.seen:
        if seen.call.site.stage != "encoder":
            own, places = seen.call.query.shape[1], max(seen.call.query.shape[1] // 4, 1)
            extended = [each.key.shape[1] for each in seen.call.extensions]
            assert (seen.call.key.shape[1], extended) == (
                (places, []) if reference_keys == "replace" else (own, [places])
            )
    whole = sample(swapped(model, None, reference, **given))
    assert difference(some, whole) > 0.003
    assert torch.equal(sample(swapped(model, None, replace(reference, mask=torch.ones(1, 5, 7)), **given)), whole)
    with_mask, without = (sample(swapped(model, replace(layout, mask=m), lambda2=1.0)) for m in (mask, None))
    assert torch.equal(with_mask, without)


# Bad input


def test_trajectories_that_do_not_fit(model: Any) -> None:
    layout, reference = fresh(1, 2)
    with pytest.raises(
        ValueError, match=r"layout trajectory is of a model of the family SDXL with 4 latent channels but "
    ):
        swapped(model, replace(layout, family="SDXL"), reference)
    with pytest.raises(
        ValueError, match=r"reference trajectory is of .* with 8 latent channels .* invert the picture wi"
    ):
        swapped(model, layout, replace(reference, states=torch.zeros(5, 1, 8, 8, 8)))
    shorter = replace(reference, sigmas=reference.sigmas[1:], states=reference.states[1:])
    with pytest.raises(ValueError, match=r"keeps 5 latents but the reference trajectory 4; invert both with the same"):
        swapped(model, layout, shorter)


@pytest.mark.parametrize("name", ["lambda2", "mask_blend_start"])
@pytest.mark.parametrize("value", [-0.1, 1.01, math.nan])
def test_shares_beyond_the_schedule(name: str, value: float, model: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {value}; give a number from 0 to 1"):
        swapped(model, *fresh(1, 2), **{name: value})


def test_other_bad_input_of_the_swap(model: Any) -> None:
    with pytest.raises(ValueError, match="blend mask needs a picture to blend with; connect a layout trajectory"):
        swapped(model, None, fresh(1)[0], blend_mask=MASK)
    with pytest.raises(ValueError, match="apply_to is 'all'; choose one of both, cond only"):
        swapped(model, *fresh(1, 2), apply_to="all")
    with pytest.raises(ValueError, match="reference_keys are 'both'; choose one of replace, extend"):
        swapped(model, *fresh(1, 2), reference_keys="both")
    (flow,) = ModelSamplingSD3().patch(model, 3.0)
    with pytest.raises(ValueError, match="layout trajectory begins at sigma 20, which a flow model does not have; inv"):
        swapped(flow, *fresh(1, 2))


def test_defaults_are_the_papers() -> None:
    defaults = {each.id: each.default for each in MultiSourceSwapNode.GET_SCHEMA().inputs if hasattr(each, "default")}
    assert (defaults["lambda2"], defaults["mask_blend_start"]) == (10 / 50, 30 / 50)
    assert (defaults["sites"], defaults["apply_to"], defaults["swap_cross_attention"]) == ("usual", "both", True)
