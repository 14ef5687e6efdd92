"""What every node promises, of AnyStory: on the small FLUX of the golden cases, with random subjects."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
from subject_patches.patches.parts.cache import FeatureCache
from torch import Tensor

from ..shared.anystory_models import golden_anystory, golden_model, loaded_anystory, told
from ..shared.anystory_runs import hooks_of, prompt, sample, settings
from ..shared.anystory_watch import Watch
from ..shared.models import difference, randn
from ..shared.partly_loaded import no_room
from ..shared.samplers import sampler_for
from ..shared.second_device import DEVICE, SecondDevice

NEVER = (0.0, 0.0)


@pytest.fixture(scope="module")
def model() -> Any:
    return golden_model()


def test_with_nothing_to_do_no_bit_changes(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Windows that hold no step: the LoRAs hang, and are off; the log says so."""
    patched = told(model, settings(token_window=(0.1, 0.2), reference_window=NEVER))
    assert torch.equal(sample(patched), sample(model))
    assert [record.getMessage() for record in caplog.records if "AnyStory did nothing" in record.getMessage()]


def test_only_the_steps_of_the_windows_differ(model: Any) -> None:
    """The predictions before the first step are the unpatched model's, bit for bit."""
    found: list[list[Tensor]] = []
    late = told(model, settings(token_window=(0.5, 1.0), reference_window=(0.5, 1.0)))
    for each in (model, late):
        found.append([])
        sample(each, steps=4, callback=lambda step, denoised, *_: found[-1].append(denoised.clone()))
    same = [torch.equal(one, other) for one, other in zip(*found, strict=True)]
    assert same == [True, True, False, False]


@pytest.mark.parametrize("ended", ["whole", "by an error"])
def test_the_given_model_is_untouched(ended: str, model: Any) -> None:
    """Also after a run that an exception ended nothing hangs on the network, and it samples as before."""
    before, patched = sample(model), told(model, settings())

    def stop(*_: Any) -> None:
        if ended != "whole":
            raise RuntimeError("stopped")

    if ended == "whole":
        first = sample(patched)
        assert difference(first, before) > 0.01
    else:
        with pytest.raises(RuntimeError, match="stopped"):
            sample(patched, callback=stop)
        first = None
    assert hooks_of(model) == 0
    assert torch.equal(sample(model), before)
    again = sample(patched)
    assert first is None or torch.equal(again, first)


@pytest.mark.parametrize("at", [2, 5, 9])
def test_the_run_after_a_pass_that_failed(at: int, model: Any) -> None:
    """Whichever block it fails in, of the picture's pass or the references', nothing half done is kept."""
    patched, plain, done = told(model, settings()), sample(model), itertools.count(1)

    def fail_once(*_: Any) -> None:
        if next(done) == at:
            raise RuntimeError("out of memory")

    network = model.model.diffusion_model
    handles = [block.register_forward_hook(fail_once) for block in (*network.double_blocks, *network.single_blocks)]
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            sample(patched, steps=3)
    finally:
        for handle in handles:
            handle.remove()
    assert hooks_of(model) == 0
    assert torch.equal(sample(model), plain)
    assert torch.equal(sample(patched, steps=3), sample(told(model, settings()), steps=3))


def test_a_batch_is_its_singles(model: Any) -> None:
    """Each picture of a batch has routes of its own."""
    patched = told(model, settings(count=3))
    batch = sample(patched, batch=3)
    for row in range(3):
        assert difference(batch[row : row + 1], sample(patched, seed=5 + row)) < 1e-5


def test_a_negative_prompt_sees_nothing(model: Any) -> None:
    """With guidance the unconditional pass stays as it is, whether or not it could share a batch; and several positive
    prompts share theirs."""
    patched = told(model, settings())
    one, other = (sample(each, cfg=1.0, steps=1) for each in (patched, model))
    with_negative = sample(patched, cfg=3.0, steps=1)
    negative = sample(model, cfg=1.0, steps=1, positive=prompt(20))
    # Of one step the result is linear in the predictions.
    assert difference(with_negative, negative + 3 * (one - negative)) < 1e-5
    assert difference(one, other) > 0.01
    half = {"strength": 0.5}
    both = [*prompt(**half), *prompt(**half)]
    assert difference(sample(patched, positive=both), sample(patched)) < 1e-5


@pytest.mark.parametrize("size", [(6, 14), (11, 9), (7, 22)])
def test_any_width_and_height(size: tuple[int, int], model: Any) -> None:
    """Also one that patches do not divide."""
    result = sample(told(model, settings()), size=size)
    assert result.shape[-2:] == size
    assert result.isfinite().all()
    assert difference(result, sample(model, size=size)) > 0.01


def test_the_next_run_does_not_look_again(model: Any) -> None:
    """References depend on the prompt's pooled output, the weights and the LoRA; not on its words, the seed or the
    size."""
    given = settings()
    patched, watch = told(model, given), Watch()
    looks = []
    with watch.over(model.model.diffusion_model):
        for values in (
            {},
            {},
            {"seed": 9, "size": (8, 8)},
            {"positive": [[randn(1, 9, 32, seed=77), prompt()[0][1]]]},
            {"positive": prompt(31)},
            {"positive": prompt(guidance=2.0)},
        ):
            sample(patched, **values)
            looks.append(watch.looks)
    assert looks == [1, 1, 1, 1, 2, 3]
    weaker = settings(strength=0.5)
    pairs = zip(weaker.references, given.references, strict=True)
    references = tuple(replace(new, cache=old.cache) for new, old in pairs)
    with watch.over(model.model.diffusion_model):
        weak = sample(told(model, replace(weaker, references=references)))
    assert watch.looks == 4
    assert difference(weak, sample(patched)) > 0.001


def test_without_room_in_the_cache(model: Any) -> None:
    """A run keeps its own; the next looks again."""
    given = settings()
    patched = told(model, replace(given, references=tuple(replace(r, cache=FeatureCache(0)) for r in given.references)))
    watch = Watch()
    with watch.over(model.model.diffusion_model):
        results = [sample(patched, steps=3) for _ in range(2)]
    assert watch.looks == 2
    assert torch.equal(*results)
    assert torch.equal(results[0], sample(told(model, given), steps=3))


@pytest.mark.parametrize("sampler", comfy.samplers.KSampler.SAMPLERS)
def test_samplers(sampler: str, model: Any) -> None:
    """Also those that call the model twice a step, or write into their levels."""
    patched = told(model, settings(reference_window=(0.3, 1.0)))
    run = {"steps": 3, **sampler_for(sampler, 0.05)}
    results = [sample(patched, **run) for _ in range(2)]
    assert results[0].isfinite().all()
    assert difference(results[0], sample(model, **run)) > 0.003
    assert torch.equal(*results)


@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_schedulers(scheduler: str, model: Any) -> None:
    run = {"scheduler": scheduler, "steps": 3}
    result = sample(told(model, settings()), **run)
    assert result.isfinite().all()
    assert difference(result, sample(model, **run)) > 0.003


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precisions(dtype: torch.dtype) -> None:
    """The weights of the file are cast to what the model computes in."""
    rounded, whole, given = golden_model(dtype=dtype), golden_model(), settings(router=False)
    plain, exact = sample(rounded), sample(whole)
    result, right = sample(told(rounded, given)), sample(told(whole, given))
    assert result.isfinite().all()
    assert difference(result, plain) > 0.01
    # Random weights make much of rounding: patched, it costs little more than it costs the model by itself.
    assert (result - right).abs().mean() < 2 * (plain - exact).abs().mean()


@pytest.mark.parametrize("router", [False, True])
def test_quantised_weights(router: bool) -> None:
    """A model kept in eight bits is what its rounded weights are in full; the LoRAs stay as the file has them."""
    kept, rounded = golden_model(dtype=torch.float8_e4m3fn, compute=torch.float32), golden_model()
    for parameter in rounded.model.diffusion_model.parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    assert {p.dtype for p in kept.model.diffusion_model.parameters()} == {torch.float8_e4m3fn}
    given = settings(router=router)
    result = sample(told(kept, given))
    assert difference(result, sample(told(rounded, given))) < 1e-4
    assert difference(result, sample(kept)) > 0.01
    assert hooks_of(kept) == 0


def test_it_moves_with_the_model() -> None:
    """The host moves the weights as a model beside the MODEL, and they go with it."""
    patched = told(golden_model(), settings())
    weights = golden_anystory().patcher.model
    assert [each.model for each in patched.get_nested_additional_models()] == [weights]
    assert [each.model for each in patched.clone().get_nested_additional_models()] == [weights]


@pytest.mark.parametrize("router", [False, True])
def test_on_a_second_device(router: bool, model: Any) -> None:
    """Model and weights on a device that is not the CPU, where tensors of both in one operation are an error."""
    expected = sample(told(model, settings(router=router, shift=-0.5)), batch=2, cfg=2.0)
    with SecondDevice():
        there, anystory = golden_model(), loaded_anystory()
        there.load_device = anystory.patcher.load_device = DEVICE
        given = settings(router=router, shift=-0.5, anystory=anystory)
        # The second run has everything from the caches.
        found = [sample(told(there, given), batch=2, cfg=2.0) for _ in range(2)]
        for patcher in (there, anystory.patcher):
            comfy.model_management.unload_model_and_clones(patcher)
    for each in found:
        assert difference(each, expected) < 1e-3


def test_offloaded_and_partly_loaded() -> None:
    """The model by parts, and the weights beside it: hooks stay on the modules, which cast what they keep elsewhere."""
    model = golden_model()
    patched = told(model, settings())
    whole = sample(patched)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(patched), whole)
    again, seen = told(model, settings()), []
    with no_room():
        parts = sample(again, callback=lambda *_: seen.append(again.model.model_lowvram))
    assert set(seen) == {True}
    assert difference(parts, whole) < 1e-5
    assert hooks_of(model) == 0
