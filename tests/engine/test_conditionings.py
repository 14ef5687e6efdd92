"""Conditionings of every kind: who gets the reference, whatever the host makes of the lists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.controlnet
import comfy.model_management
import comfy.ops
import comfy.samplers
import folder_paths
import pytest
import torch
from comfy.cldm.cldm import ControlNet
from comfy_extras.nodes_custom_sampler import DualCFGGuider, RandomNoise, SamplerCustomAdvanced
from comfy_extras.nodes_hooks import ConditioningSetProperties, CreateHookKeyframe, CreateHookLora, SetHookKeyframes
from hosting.random_models import fill
from safetensors.torch import save_file
from subject_patches.nodes.inputs import NEARLY_CLEAN
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.families import attention_sites
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared.look import Look
from subject_patches.tests.shared.models import (
    CONTEXT,
    SMALL,
    Conditioning,
    difference,
    generator,
    inputs_of,
    prompt,
    randn,
    recycled,
    sample,
    subject,
)
from subject_patches.tests.shared.references import keys_and_values
from subject_patches.tests.shared.step_blending import guider_of, sample_with
from torch import Tensor

import nodes as host_nodes

SIZE = (16, 16)
FEW = 0.003


def blank(length: int = 7) -> Conditioning:
    """A negative prompt of zeros: its cross-attention's keys are zeros too, which tells its chunks from all others."""
    return [[torch.zeros(1, length, CONTEXT), {}]]


def area(seed: int, height: int, width: int, y: int, x: int, of: Conditioning | None = None) -> Conditioning:
    """A prompt for one area, in latent pixels."""
    given = prompt(seed) if of is None else of
    return host_nodes.ConditioningSetArea().append(given, 8 * width, 8 * height, 8 * x, 8 * y, 1.0)[0]


def ranged(seed: int, start: float, end: float) -> Conditioning:
    return host_nodes.ConditioningSetTimestepRange().set_range(prompt(seed), start, end)[0]


def looking(model: Any) -> tuple[Any, Look]:
    look = Look(frozenset(attention_sites(model)), Window())
    return add_edit(model, look), look


def check(look: Look, unconditioned: bool = True) -> None:
    """Chunks whose prompt is not blank got the reference at all decoder layers, blank ones at none."""
    chunks: dict[int, list[Any]] = {}
    for seen in look.seen:
        chunks.setdefault(id(seen.call.chunk), []).append(seen.call)
    kinds = set()
    for calls in chunks.values():
        reads_nothing = all(not call.key.any() for call in calls if call.site.kind == "cross")
        own = [call for call in calls if call.site.kind == "self"]
        got = [bool(call.extensions) for call in own]
        wanted = [not reads_nothing and call.site.stage != "encoder" for call in own]
        assert got == wanted, (calls[0].chunk.name, reads_nothing)
        kinds.add(reads_nothing)
    assert kinds == ({True, False} if unconditioned else {False})


PROMPTS: dict[str, tuple[Conditioning, Conditioning]] = {
    "one and one": (prompt(1), blank()),
    "twice as long": (prompt(1, 154), blank(77)),
    "negative twice as long": (prompt(1, 77), blank(154)),
    "too long for one batch": (prompt(1, 7), blank(35)),
    "two combined": (prompt(1) + prompt(3, 14), blank()),
    "two negatives": (prompt(1), blank() + blank(14)),
    "by time": (ranged(1, 0.0, 0.5) + ranged(3, 0.5, 1.0), blank()),
    "area": (prompt(1) + area(3, 8, 10, 2, 4), blank()),
    "area only": (area(3, 16, 10, 0, 4), blank()),
    "two areas": (area(1, 16, 8, 0, 0) + area(3, 16, 10, 0, 6), blank()),
    "negative area": (prompt(1), blank() + area(0, 8, 8, 4, 4, blank())),
    "areas on both": (prompt(1) + area(3, 8, 10, 2, 4), blank() + area(0, 8, 8, 4, 4, blank())),
    "area twice as long": (prompt(1) + area(3, 8, 10, 2, 4, prompt(3, 14)), blank()),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", PROMPTS)
def test_only_conditioned_chunks_get_the_reference(name: str, batch: int, model: Any) -> None:
    positive, negative = PROMPTS[name]
    patched, look = looking(recycled(model))
    run = {"positive": positive, "negative": negative, "size": SIZE, "batch": batch}
    result = sample(patched, **run)
    check(look)
    assert difference(result, sample(model, **run)) > FEW


def test_without_guidance(model: Any) -> None:
    patched, look = looking(recycled(model))
    assert difference(sample(patched, cfg=1.0, negative=blank()), sample(model, cfg=1.0, negative=blank())) > FEW
    check(look, unconditioned=False)


@pytest.mark.parametrize("areas", [False, True], ids=["whole", "with an area"])
@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_guidance(style: str, areas: bool, model: Any) -> None:
    first = prompt(1) + area(4, 8, 10, 2, 4) if areas else prompt(1)

    def run(target: Any) -> Tensor:
        guider = DualCFGGuider.execute(target, first, prompt(3), blank(), 3.0, 2.0, style).args[0]
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2)
        sampler = comfy.samplers.sampler_object("euler")
        noise = RandomNoise.execute(7).args[0]
        with torch.inference_mode():
            latent = {"samples": torch.zeros(2, 4, *SIZE)}
            return SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args[0]["samples"]

    patched, look = looking(recycled(model))
    assert difference(run(patched), run(model)) > FEW
    check(look)
    assert {seen.call.chunk.name for seen in look.seen} == {"positive", "middle", "negative"}


@pytest.mark.parametrize("name", ["area", "two areas"])
def test_regions_are_cropped_with_their_area(name: str, model: Any) -> None:
    region = torch.zeros(1, *SIZE)
    region[:, 3:9, 6:12] = 1
    positive, negative = PROMPTS[name]
    patched, look = looking(recycled(model, region_mask=region, sites="named", named_sites="output.3"))
    sample(patched, positive=positive, negative=negative, size=SIZE)
    shapes = set()
    for call in (seen.call for seen in look.seen if seen.call.extensions):
        height, width, y, x = call.chunk.area or (*SIZE, 0, 0)
        shapes.add((height, width, y, x))
        assert call.grid == (height, width)
        seen_by = region[0, y : y + height, x : x + width] > 0
        assert torch.equal(call.extensions[0].route[0].view(call.grid), seen_by)
    areas = {"area": {(16, 16, 0, 0), (8, 10, 2, 4)}, "two areas": {(16, 8, 0, 0), (16, 10, 0, 6)}}
    assert shapes == areas[name]


def test_the_reference_reads_the_prompt_in_force(model: Any) -> None:
    with inputs_of(model) as calls:
        sample(recycled(model), positive=ranged(1, 0.0, 0.5) + ranged(3, 0.5, 1.0), steps=4, size=SIZE)
    read = [call["context"] for call in calls if call["x"].shape[-2:] == (6, 8)]
    prompts = [prompt(1)[0][0], prompt(3)[0][0]]
    assert [[torch.equal(tokens, other) for other in prompts] for tokens in read] == [[True, False]] * 2 + [
        [False, True]
    ] * 2


# ControlNet and LoRA hooks


def control_net() -> Any:
    config = {name: value for name, value in SMALL.items() if name not in ("out_channels", "transformer_depth_output")}
    heads = {"num_heads": 8, "hint_channels": 3, "operations": comfy.ops.manual_cast}
    network = ControlNet(**{**config, **heads}).eval().requires_grad_(False)
    fill(network, 4)
    return comfy.controlnet.ControlNet(network, load_device=comfy.model_management.get_torch_device())


def test_with_a_control_net(model: Any) -> None:
    hint = torch.rand(1, 96, 128, 3, generator=generator(5))
    apply = host_nodes.ControlNetApplyAdvanced().apply_controlnet
    positive, negative = apply(prompt(1), prompt(2), control_net(), hint, 0.5, 0.0, 1.0)
    run = {"size": (12, 16), "steps": 3}
    controlled = {"positive": positive, "negative": negative, **run}
    who = subject()
    patched, look = looking(recycled(model, (who,)))
    both = sample(patched, **controlled)
    assert both.isfinite().all()
    assert difference(both, sample(recycled(model), **run)) > FEW
    assert difference(both, sample(model, **controlled)) > FEW
    # A subject's features are its own: they come from a pass without the control.
    lent = [seen for seen in look.of("positive") if seen.call.extensions]
    assert lent
    for seen in lent:
        key, _ = keys_and_values(model, who, 0, seen.sigma, 0)[seen.call.site]
        torch.testing.assert_close(seen.call.extensions[0].key, key, rtol=0, atol=1e-4)


@pytest.fixture
def lora(tmp_path: Path) -> Iterator[str]:
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v"
    factors = {f"{name}.lora_up.weight": randn(64, 2, seed=90), f"{name}.lora_down.weight": randn(2, 64, seed=91)}
    save_file(factors, tmp_path / "subject-patches-test.safetensors")
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    yield "subject-patches-test.safetensors"
    folder_paths.folder_names_and_paths["loras"][0].remove(str(tmp_path))


def hooked(seed: int, hooks: Any) -> Conditioning:
    return ConditioningSetProperties().set_properties(prompt(seed), 1.0, "default", hooks=hooks)[0]


def scheduled(hooks: Any, *strengths: float) -> Any:
    """Hooks with keyframes at equal distances over the schedule."""
    keyframes = None
    for number, strength in enumerate(strengths):
        (keyframes,) = CreateHookKeyframe().create_hook_keyframe(strength, number / len(strengths), keyframes)
    return SetHookKeyframes().set_hook_keyframes(hooks, keyframes)[0]


def weights_in(model: Any, **run: Any) -> dict[int, list[float]]:
    """What the hooked layer's weights add up to in each call of a run's conditioned rows, by how many tokens a row
    has. Without guidance, so that the calls are those of the positive prompt."""
    seen: dict[int, list[float]] = {}
    layer = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_v

    def look(module: Any, given: Any) -> None:
        seen.setdefault(given[0].shape[1], []).append(float(module.weight.double().sum()))

    hook = layer.register_forward_pre_hook(look)
    try:
        sample(model, cfg=1.0, **run)
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("noise_level", ["current", NEARLY_CLEAN])
def test_keyframes_of_hooks_are_those_of_the_step(noise_level: str, lora: str, model: Any) -> None:
    """In the picture's calls and a reference's, whatever noise level that is looked at."""
    strengths = (1.0, 0.4, 0.0, 0.7)
    (hooks,) = CreateHookLora().create_hook(lora, 1.0, 0.0)
    run = {"positive": hooked(1, scheduled(hooks, *strengths)), "steps": 8, "size": (8, 16)}
    ((_, alone),) = weights_in(model, **run).items()
    assert len(set(alone)) == len(strengths)
    picture, lent = sorted(weights_in(recycled(model, noise_level=noise_level), **run).items(), reverse=True)
    assert picture[1] == alone
    assert lent[1] == alone


def test_a_given_conditioning_has_hooks_that_the_prompts_have(
    lora: str, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (hooks,) = CreateHookLora().create_hook(lora, 1.0, 0.0)
    own, other = scheduled(hooks, 1.0, 0.4), scheduled(hooks, 0.7, 0.0)
    run = {"positive": hooked(1, own), "steps": 4, "size": (8, 16)}
    ((_, alone),) = weights_in(model, **run).items()
    ((_, theirs),) = weights_in(model, **{**run, "positive": hooked(1, other)}).items()
    for noise_level in ("current", NEARLY_CLEAN):
        patched = recycled(model, reference_conditioning=hooked(3, other), noise_level=noise_level)
        picture, lent = sorted(weights_in(patched, **run).items(), reverse=True)
        assert (picture[1], lent[1]) == (alone, theirs)
    assert not caplog.records


def test_hooks_of_a_given_conditioning_alone_are_named(lora: str, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """And its features are kept, since nothing of the hooks is in them."""
    (hooks,) = CreateHookLora().create_hook(lora, 1.0, 0.0)
    who = subject()
    result = sample(recycled(model, (who,), reference_conditioning=hooked(3, hooks)))
    (told,) = {record.getMessage() for record in caplog.records}
    assert "hooks that are on none of the sampler's own prompts" in told
    assert torch.equal(result, sample(recycled(model, reference_conditioning=prompt(3))))
    assert len(who.cache) > 0


def test_hooks_in_a_run_of_one_model_twice(lora: str, model: Any) -> None:
    """Step-Blended Guider's two runs do not take away each other's."""
    (hooks,) = CreateHookLora().create_hook(lora, 1.0, 0.0)

    def result(second: Any, **prompts: Any) -> Tensor:
        return sample_with(guider_of(model, second, 2, **prompts))

    with_hooks = {"personalised_positive": hooked(11, hooks)}
    once = result(model, **with_hooks)
    assert torch.equal(once, result(model.clone(), **with_hooks))
    assert difference(once, result(model)) > FEW


@pytest.mark.parametrize("on", ["positive", "both"])
def test_with_lora_hooks(on: str, lora: str, model: Any) -> None:
    (hooks,) = CreateHookLora().create_hook(lora, 0.6, 0.0)
    given = {name: hooked(seed, hooks) for name, seed in (("positive", 1), ("negative", 2)) if on in (name, "both")}
    ours = recycled(model)
    plain = sample(ours)
    both = sample(ours, **given)
    assert both.isfinite().all()
    assert difference(both, plain) > FEW
    assert difference(both, sample(model, **given)) > FEW
    assert torch.equal(sample(ours, **given), both)
    assert torch.equal(sample(ours), plain)
