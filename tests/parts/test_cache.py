"""The features a subject keeps: the store itself, and what it saves and forgets between runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.conds import CONDList
from comfy.sd import load_bypass_lora_for_models
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from subject_patches.nodes.inputs import NEARLY_CLEAN
from subject_patches.patches.parts.cache import MEGABYTE, FeatureCache
from subject_patches.patches.parts.identity import digest_of
from subject_patches.patches.parts.sites import Site
from subject_patches.tests.shared.models import (
    counted,
    generator,
    latent_noise,
    prompt,
    recycled,
    sample,
    small_model,
    subject,
)
from torch import Tensor

CPU = torch.device("cpu")


HERE, THERE = Site("self", "middle", 0, 0), Site("self", "output", 3, 0)


def features(count: int, value: float = 0.0, site: Site = HERE) -> dict[Site, dict[str, Tensor]]:
    """Two tensors of `count` bytes in all."""
    return {site: {"key": torch.full((count // 8,), value), "value": torch.full((count // 8,), value)}}


def kept(cache: FeatureCache, key: Any, run: Any) -> dict[str, Tensor] | None:
    """What a cache has of HERE under a key."""
    return cache.get(key, [HERE], run, CPU).get(HERE)


def test_gives_back_what_it_was_given() -> None:
    cache = FeatureCache(1000)
    tensors = features(80, 3.0)
    cache.put("a", tensors, "run", CPU)
    tensors[HERE]["key"].zero_()
    assert kept(cache, "a", "run")["key"].tolist() == [3.0] * 10
    assert kept(cache, "b", "run") is None
    assert (len(cache), cache.size) == (1, 80)


def test_more_sites_join_those_of_a_key() -> None:
    cache = FeatureCache(200)
    cache.put("a", features(80, 1.0), "first", CPU)
    cache.put("b", features(80, 2.0), "first", CPU)
    cache.put("a", features(80, 3.0) | features(80, 4.0, THERE), "second", CPU)
    found = cache.get("a", [HERE, THERE], "third", CPU)
    # What was there stays, and is never dropped for what joins it.
    assert {site: parts["key"][0].item() for site, parts in found.items()} == {HERE: 1.0, THERE: 4.0}
    assert cache.get("a", [THERE], "third", CPU).keys() == {THERE}
    assert (len(cache), cache.size) == (1, 160)
    cache.put("a", features(80, site=Site("cross", "middle", 0, 0)), "third", CPU)
    assert cache.get("a", [HERE, THERE], "third", CPU).keys() == {HERE, THERE}
    assert cache.size == 160


def test_drops_the_least_recently_used_of_other_runs() -> None:
    cache = FeatureCache(240)
    for key in ("a", "b", "c"):
        cache.put(key, features(80), "first", CPU)
    assert kept(cache, "a", "second") is not None
    cache.put("d", features(80), "third", CPU)
    assert [key for key in "abcd" if kept(cache, key, "fourth")] == ["a", "c", "d"]
    assert cache.size == 240


def test_a_run_never_drops_its_own() -> None:
    cache = FeatureCache(240)
    for key in ("a", "b", "c", "d"):
        cache.put(key, features(80), "first", CPU)
    assert [key for key in "abcd" if kept(cache, key, "second")] == ["a", "b", "c"]
    cache.put("d", features(80), "second", CPU)
    assert kept(cache, "d", "second") is None


@pytest.mark.parametrize("limit", [0, 79])
def test_what_is_too_big_is_not_kept(limit: int) -> None:
    cache = FeatureCache(limit)
    cache.put("a", features(80), "run", CPU)
    assert (len(cache), cache.size) == (0, 0)


def test_is_never_over_its_size() -> None:
    cache = FeatureCache(500)
    for number in range(60):
        cache.put(number, features(8 * (1 + number * 7 % 20)), number // 5, CPU)
        assert cache.size <= 500
    held = [kept(cache, number, "last") for number in range(60)]
    assert sum(t.numel() * 4 for entry in held if entry for t in entry.values()) == cache.size


def test_everything_is_kept_on_the_offload_device() -> None:
    meta = torch.device("meta")
    cache = FeatureCache(1000)
    cache.put("a", features(160), "run", meta)
    assert cache._entries["a"].features[HERE]["key"].device == meta


# In sampling runs

STEPS = 3


def passes(patched: Any, calls: list[int], **run: Any) -> tuple[Tensor, int]:
    """The result, and how many calls of the model were passes of a reference: the generation's have two rows."""
    calls.clear()
    result = sample(patched, steps=STEPS, **run)
    assert calls.count(2) == STEPS
    return result, calls.count(1)


def test_warm_is_cold_bit_for_bit_and_runs_no_reference_pass(model: Any) -> None:
    calls: list[int] = []
    patched = recycled(counted(model, calls))
    cold, first = passes(patched, calls)
    warm, second = passes(patched, calls)
    assert (first, second) == (STEPS, 0)
    assert torch.equal(warm, cold)
    other, third = passes(patched, calls, seed=6)
    assert third == 0
    assert not torch.equal(other, cold)


def test_two_nodes_with_one_subject_share_its_passes(model: Any) -> None:
    calls: list[int] = []
    who = subject()
    once = recycled(counted(model, calls), (who,))
    assert passes(recycled(once, (who,), strength=0.5), calls)[1] == STEPS


def test_a_run_needs_no_cache_for_what_serves_all_of_its_steps(model: Any) -> None:
    calls: list[int] = []
    for given, wanted in (({"noise_level": NEARLY_CLEAN}, 1), ({"refresh_steps": 2}, 2), ({}, STEPS)):
        result, count = passes(recycled(counted(model, calls), (subject(megabytes=0),), **given), calls)
        assert count == wanted
        assert torch.equal(result, passes(recycled(counted(model, calls), **given), calls)[0])


def with_lora(model: Any) -> Any:
    clone = model.clone()
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_k.weight"
    clone.add_patches({name: (torch.randn(64, 64, generator=generator(3)) * 0.1,)}, 1.0)
    return clone


def with_attention_patch(model: Any) -> Any:
    clone = model.clone()
    clone.set_model_attn2_output_patch(lambda output, extra: output * 1.5)
    return clone


def with_other_prediction(model: Any) -> Any:
    return ModelSamplingDiscrete().patch(model, "v_prediction", False)[0]


def with_bypassed_lora(model: Any) -> Any:
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_k"
    up, down = (torch.randn(*shape, generator=generator(3)) * 0.3 for shape in ((64, 4), (4, 64)))
    return load_bypass_lora_for_models(
        model, None, {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, 1, 0
    )[0]


@pytest.mark.parametrize("change", [with_lora, with_bypassed_lora, with_attention_patch, with_other_prediction])
def test_a_changed_model_starts_afresh(change: Callable[[Any], Any], model: Any) -> None:
    calls: list[int] = []
    base = counted(model, calls)
    who = subject()
    before, _ = passes(recycled(base, (who,)), calls)
    changed = change(base)
    after, count = passes(recycled(changed, (who,)), calls)
    assert count == STEPS
    assert torch.equal(after, passes(recycled(changed, (subject(),)), calls)[0])
    # What the first model's features were is still known.
    again, count = passes(recycled(base, (who,)), calls)
    assert count == 0
    assert torch.equal(again, before)


def at_sigmas(model: Any, sigmas: list[float]) -> Tensor:
    with torch.inference_mode():
        noise = latent_noise(1, (8, 8), 5)
        sampler = comfy.samplers.sampler_object("euler")
        return comfy.sample.sample_custom(
            model, noise, 3.0, sampler, torch.tensor(sigmas), prompt(1), prompt(2), torch.zeros_like(noise),
            disable_pbar=True, seed=5,
        )  # fmt: skip


def test_another_schedule_of_the_model_is_another_model(model: Any) -> None:
    # At one sigma the two tell the U-Net different timesteps.
    rescaled = ModelSamplingDiscrete().patch(model, "eps", True)[0]
    who, sigmas = subject(), [5.0, 1.0, 0.0]
    at_sigmas(recycled(model, (who,)), sigmas)
    assert torch.equal(at_sigmas(recycled(rescaled, (who,)), sigmas), at_sigmas(recycled(rescaled), sigmas))


@pytest.mark.parametrize(
    "values",
    [{"positive": prompt(8)}, {"positive": prompt(1, 14)}, {"scheduler": "karras"}],
    ids=["prompt", "length", "schedule"],
)
def test_another_run_starts_afresh(values: dict[str, Any], model: Any) -> None:
    calls: list[int] = []
    who = subject()
    patched = recycled(counted(model, calls), (who,))
    passes(patched, calls)
    after, count = passes(patched, calls, **values)
    assert count == STEPS
    assert torch.equal(after, passes(recycled(counted(model, calls)), calls, **values)[0])


def test_another_seed_or_model_starts_afresh(model: Any) -> None:
    calls: list[int] = []
    who = subject()
    passes(recycled(counted(model, calls), (who,)), calls)
    assert passes(recycled(counted(model, calls), (who,), seed=1), calls)[1] == STEPS
    assert passes(recycled(counted(small_model(seed=1), calls), (who,)), calls)[1] == STEPS


@pytest.mark.parametrize("form", [list, tuple, lambda tensors: dict(enumerate(tensors))])
def test_a_conditioning_is_known_by_all_that_its_lists_hold(form: Callable[[list[Tensor]], Any]) -> None:
    """As reference latents are given to the host's models: printed, the two look alike."""
    one, other, same = ([torch.zeros(1, 16, 64, 64), torch.ones(3)] for _ in range(3))
    other[0][0, 8, 32, 32] = 1
    digests = [digest_of({"ref_latents": CONDList(form(each))}) for each in (one, other, same)]
    assert digests[0] == digests[2] != digests[1]


def test_without_room_every_run_is_cold(model: Any) -> None:
    calls: list[int] = []
    who = subject(megabytes=0)
    patched = recycled(counted(model, calls), (who,))
    cold, _ = passes(patched, calls)
    again, count = passes(patched, calls)
    assert count == STEPS
    assert len(who.cache) == 0
    assert torch.equal(again, cold)
    assert torch.equal(cold, sample(recycled(model), steps=STEPS))


def test_a_small_cache_keeps_what_fits(model: Any) -> None:
    calls: list[int] = []
    whole = subject()
    right, _ = passes(recycled(counted(model, calls), (whole,)), calls)
    limit = whole.cache.size // 2
    who = subject(megabytes=limit / MEGABYTE)
    patched = recycled(counted(model, calls), (who,))
    for _ in range(3):
        result, count = passes(patched, calls)
        assert torch.equal(result, right)
        assert 0 < who.cache.size <= limit
    # Half of the steps' features fit; a step that lacks some runs its pass.
    assert 0 < count < STEPS
