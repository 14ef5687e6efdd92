"""AnyStory on the host's FLUX against the numbers of the authors' code: every stream after every block, maps, results.

What is left of a difference is the host's own: of the unpatched model, too, float32 gives another timestep embedding on
another processor, by 1e-5.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.samplers
import pytest
import torch
from comfy.ldm.flux.layers import timestep_embedding
from subject_patches.patches.anystory.anystory import steps_of
from torch import Tensor

from ..shared.anystory_models import AnyStoryCase, calls_at, golden_anystory, golden_model, guided, packed, told
from ..shared.anystory_watch import Watch
from ..shared.golden_cases import cases_of
from ..shared.models import difference

TOLERANCE, LOOP_TOLERANCE = 2e-5, 1e-5
_OF_STREAMS = ("double", "single", "out", "cache")

forwards = cases_of("anystory", AnyStoryCase, lambda case: "in.img" in case.tensors)
loops = cases_of("anystory", AnyStoryCase, lambda case: "noise_pred_per_step" in case.tensors)


@pytest.mark.parametrize("golden", forwards, ids=lambda golden: golden.name)
def test_forward_is_the_authors(golden: AnyStoryCase) -> None:
    """Each row by itself: every stream after every block, the references' keys and values, the maps exactly, and the
    result; where the case has a second call, that one with what the first has kept."""
    t = golden.tensors
    for row in range(len(t["in.img"])):
        model, settings = golden_model(), golden.settings(golden_anystory(), row)
        times = [float(t["in.timestep"][row])]
        if "out2_cached" in t:
            # Its second call is without the subjects' tokens: the second of two steps.
            times.append(float(t["in.timestep2"][row]))
            settings = replace(settings, token_window=(0.0, 0.5))
        patched, latents = told(model, settings), golden.picture(t["in.img"][row : row + 1])
        watch, sigmas = Watch(), torch.tensor([*times, 0.0])
        with watch.over(model.model.diffusion_model):
            guided(patched, golden.prompt(row), latents, sigmas, calls_at(sigmas, latents))
        found = watch.passes[0] | watch.references | _kept(golden, patched)
        allowed = TOLERANCE + _of_the_host(model, t, row)
        if len(times) > 1:
            found |= {f"step2.{name}": tensor for name, tensor in watch.passes[1].items()}
            found |= dict.fromkeys(("out2_cached", "out2_uncached"), watch.passes[1]["out"])
            assert watch.looks == 1
        for name in (n for n in t if n.removeprefix("step2.").startswith(_OF_STREAMS)):
            expected = t[name][row : row + 1] if len(t[name]) > 1 else t[name]
            assert float((found[name] - expected).abs().max()) < allowed, name
        if "routing_map" in t:
            assert torch.equal(torch.cat(watch.maps).float(), t["routing_map"][:, row])
            assert float((torch.cat(watch.logits) - t["routing_logits"][:, row]).abs().max()) < allowed


def _of_the_host(model: Any, t: dict[str, Tensor], row: int) -> float:
    """By how much the host's own embedding of time, guidance and pooled prompt differs here from the case's."""
    if "temb" not in t:
        return 0.0
    network, here = model.model.diffusion_model, slice(row, row + 1)
    with torch.inference_mode():
        made = network.vector_in(t["in.pooled"][here])
        for module, value in ((network.time_in, t["in.timestep"]), (network.guidance_in, t["in.guidance"])):
            made = made + module(timestep_embedding(value[here], 256))
    return min(float((made - t["temb"][here]).abs().max()), TOLERANCE)


def _kept(golden: AnyStoryCase, patched: Any) -> dict[str, Tensor]:
    """What the subjects' caches hold, as the case names it: it has the places outside the mask, too."""
    streams = patched.model_options["transformer_options"]["subject_patches"][0].settings.references
    found: dict[str, list[Tensor]] = {}
    for stream in streams:
        for entry in stream.cache._entries.values():
            for site, features in entry.features.items():
                for part, tensor in features.items():
                    blocks = "transformer_blocks" if site.block == "double" else "single_transformer_blocks"
                    name = f"cache.{blocks}.{site.number}.attn.processor.ref_{part}"
                    heads = tensor.unflatten(-1, (golden.case["heads"], -1)).transpose(1, 2)
                    whole = golden.tensors.get(name)
                    if whole is not None and stream.kept is not None:
                        # What is not kept nobody sees; it is filled up with the case's own.
                        size = whole.shape[2] // golden.subjects
                        filled = whole[:, :, len(found.get(name, ())) * size :][:, :, :size].clone()
                        filled[:, :, stream.kept] = heads
                        heads = filled
                    found.setdefault(name, []).append(heads)
    return {name: torch.cat(tensors, 2) for name, tensors in found.items()}


@pytest.mark.parametrize("golden", loops, ids=lambda golden: golden.name)
def test_loop_is_the_authors(golden: AnyStoryCase) -> None:
    """A whole sampling by the host's Euler: windows, one look at the references if any, each prediction, and the result
    within a hundred-thousandth of its largest value."""
    model, t = golden_model(), golden.tensors
    patched, watch = told(model, golden.settings(golden_anystory())), Watch()
    with watch.over(model.model.diffusion_model):
        euler = comfy.samplers.sampler_object("euler")
        result = guided(patched, golden.prompt(), golden.picture(t["latents"]), t["sigmas"], euler)
    assert watch.looks == bool(steps_of(*golden.windows["reference_window"], len(watch.passes)))
    for found, expected in zip(watch.passes, t["noise_pred_per_step"], strict=True):
        assert difference(found["out"], expected) < LOOP_TOLERANCE
    # The host gives latents out of its model's space.
    assert difference(packed(model.model.process_latent_in(result)), t["out_latents"]) < LOOP_TOLERANCE
