"""Transformers beside what other packs and the host's own nodes do to them, in any order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import comfy.ldm.flux.math
import comfy.ldm.modules.attention
import pytest
import torch
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from comfy_extras.nodes_torch_compile import TorchCompileModel
from hosting.random_models import SMALL_CONTEXT
from subject_patches.patches.engine.call import AttentionCall
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.families import attention_sites, family_of
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared.dense_dit import ByHand
from subject_patches.tests.shared.dit_models import PATCHED, dit_model
from subject_patches.tests.shared.look import Acting
from subject_patches.tests.shared.mechanisms import FLUX_MECHANISMS, MECHANISMS, Mechanism
from subject_patches.tests.shared.models import (
    difference,
    frames_of,
    known_prompt,
    latent_noise,
    randn,
    recycled,
    sample,
    second_context,
    subject_for,
)
from torch import Tensor

# One that extends the keys, one that biases them, one that takes the output apart.
CHOSEN = [m for m in MECHANISMS if m.name in ("recycled self-attention", "soft layout bias", "dual branch")]
Other = Callable[[Any], Any]


@pytest.fixture(scope="module")
def flux() -> Any:
    return dit_model("FLUX.1")


@pytest.fixture(scope="module")
def sd3() -> Any:
    return dit_model("SD 3.5")


def with_override(function: Callable[..., Tensor]) -> Other:
    def patch(model: Any) -> Any:
        clone = model.clone()
        clone.model_options["transformer_options"]["optimized_attention_override"] = function
        return clone

    return patch


def another_function(
    function: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **named: Any
) -> Tensor:
    """As packs with attention functions of their own: the given one is not called. Halved, so that one sees it act."""
    return comfy.ldm.modules.attention.attention_basic(q, k, v, heads, mask=mask, **named) / 2


def replaced(model: Any) -> Any:
    """Another pack's replacement of a block, which runs the block on less."""

    def replacement(given: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        return extra["original_block"]({**given, "img": given["img"] * 0.8})

    clone = model.clone()
    for name in ("double_block", "single_block"):
        clone.set_model_patch_replace(replacement, "dit", name, 0)
    return clone


def skipping(model: Any) -> Any:
    return SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, "1", "1").args[0]


def caching(node: Any) -> Other:
    return lambda model: node.execute(model, 1e6, 0.0, 1.0, False).args[0]


OTHERS: dict[str, Other] = {
    "an attention function": with_override(another_function),
    "replaced blocks": replaced,
    "Skip Layer Guidance": skipping,
    "a step cache": caching(EasyCacheNode),
    "a cache of guided steps": caching(LazyCacheNode),
}


BESIDE = [(each, family) for each in CHOSEN for family in ("flux", "sd3")] + [(FLUX_MECHANISMS[-1], "flux")]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("mechanism", "family"), BESIDE, ids=lambda each: getattr(each, "name", each))
def test_beside_others(mechanism: Mechanism, family: str, name: str, request: pytest.FixtureRequest) -> None:
    model, other = request.getfixturevalue(family), OTHERS[name]
    steps = 4 if "cache" in name else 2
    subjects = (subject_for(model),)
    alone = sample(other(model), steps=steps)
    before = sample(mechanism.on(other(model), subjects), steps=steps)
    assert torch.equal(sample(other(mechanism.on(model, subjects)), steps=steps), before)
    # Ours acts, and theirs; the host's step cache does not know SD 3.5.
    assert difference(before, alone) > 1e-3
    if (family, name) == ("sd3", "a step cache"):
        return
    assert difference(before, sample(mechanism.on(model, subjects), steps=steps)) > 1e-3


def test_an_override_is_left_alone_where_nothing_is_amended(flux: Any) -> None:
    other = OTHERS["an attention function"](flux)
    idle = add_edit(other, Acting(frozenset(attention_sites(flux)), Window(), lambda call: None))
    assert torch.equal(sample(idle), sample(other))


# The families that read reference latents, Krea 2 when it is told how, and whether these stand behind the picture.
READING = {**dict.fromkeys(("FLUX.1", "FLUX.2", "Qwen-Image", "Qwen-Image-Edit", "Krea 2"), True), "Z-Image": False}


# With Lumina 2 they end in an error of the host's.
@pytest.mark.parametrize("name", [name for name in PATCHED if name != "Lumina 2"])
def test_reference_latents_of_the_hosts_own(name: str) -> None:
    """The picture attends to them and to ours, and they are nobody's own keys: against the dense attention. The other
    families read none."""
    model, size, sizes = dit_model(name), (8, 10), ((6, 8), (4, 4))
    channels, frames = model.model.latent_format.latent_channels, frames_of(model)
    shown = {"reference_latents": [latent_noise(1, each, 9, channels, frames) for each in sizes]}
    shown |= {"reference_latents_method": "index"} if name == "Krea 2" else {}
    alone, beside = (
        {"positive": known_prompt(**second_context(model, 1), **more), "steps": 1, "size": size} for more in ({}, shown)
    )
    plain = sample(model, **beside)
    assert (difference(sample(model, **alone), plain) > 1e-3) == (name in READING)
    if name not in READING:
        return
    look = Acting(frozenset(attention_sites(model)), Window(), lambda call: None)
    assert torch.equal(sample(add_edit(model, look), **beside), plain)
    who, family = subject_for(model), family_of(model)
    behind = sum(math.prod(family.grid(each)) for each in sizes) if READING[name] else 0
    by_hand = model.clone()
    override = ByHand(model, who, alone["positive"], size, family.patch, behind=behind)
    by_hand.model_options["transformer_options"]["optimized_attention_override"] = override
    ours = sample(recycled(model, (who,), sites="usual", noise_level="current"), **beside)
    assert difference(ours, sample(by_hand, **beside)) < 1e-5
    assert difference(ours, plain) > 1e-3


def pictures_of_z_image(prompts: int, seed: int = 9) -> dict[str, list[Tensor]]:
    """Two reference latents as the host's node for Z-Image Omni gives them, with so many prompts around them."""
    texts = [randn(1, length, SMALL_CONTEXT, seed=seed + length) for length in (5, 40, 3)[:prompts]]
    latents = [latent_noise(1, size, seed, 16) for size in ((6, 8), (4, 4))]
    return {"reference_latents": latents, **({"reference_latents_text_embeds": texts} if texts else {})}


@pytest.mark.parametrize("prompts", [0, 1, 3])
def test_the_prompt_is_found_among_those_of_the_hosts_pictures(prompts: int) -> None:
    """On Z-Image theirs come before it, and one more after it: the keys that change with the prompt are its own."""
    model = dit_model("Z-Image")
    for layer in model.model.diffusion_model.context_refiner:
        # So that no prompt's tokens reach another's.
        layer.attention.out.weight.data.zero_()
    keys = []
    for seed in (1, 2):
        look = Acting(frozenset(attention_sites(model)), Window(), lambda call: None)
        sample(add_edit(model, look), positive=known_prompt(seed, **pictures_of_z_image(prompts)), steps=1)
        keys.append(look.seen[0].key)
    changed = (keys[0] != keys[1]).any(-1)[0].nonzero().flatten().tolist()
    (found,) = {(call.prompt.start, call.prompt.stop) for call in look.seen}
    assert changed == list(range(*found))
    assert found[0] == (64, 64, 96)[(0, 1, 3).index(prompts)]


def test_a_branch_beside_the_hosts_pictures(caplog: pytest.LogCaptureFixture) -> None:
    """Dual-Branch Integration takes the prompt's part of the attention also where theirs stand before it, in every
    layer: the log says of none that it was left alone."""
    model = dit_model("Z-Image")
    (branched,) = (each for each in MECHANISMS if each.name == "dual branch")
    given = {"positive": known_prompt(**pictures_of_z_image(3)), "steps": 2}
    plain = sample(model, **given)
    subject = subject_for(model)
    assert difference(sample(branched.on(model, (subject,)), **given), plain) > 1e-4
    assert [each.message for each in caplog.records if "Dual-Branch" in each.message] == []
    assert torch.equal(sample(branched.on(model, (subject,), strength=0.0), **given), plain)


def test_a_reference_is_run_without_the_hosts_reference_latents(flux: Any) -> None:
    """So its features are the same with them and without."""
    rows: list[int] = []
    patched = recycled(flux, (subject_for(flux),))
    hook = flux.model.diffusion_model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        for latents in ({}, {"reference_latents": [latent_noise(1, (4, 4), 9, 16)]}):
            rows.clear()
            sample(patched, positive=known_prompt(**latents), negative=known_prompt(2, **latents), steps=1)
            assert rows == ([2] if latents else [1, 2])
    finally:
        hook.remove()


def test_fill_is_told_that_nothing_of_a_reference_is_hidden() -> None:
    model = dit_model("FLUX.1", in_channels=96)
    who = subject_for(model)
    seen: list[Tensor] = []
    hook = model.model.diffusion_model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        sample(recycled(model, (who,)), steps=1)
    finally:
        hook.remove()
    companion = seen[0]
    clean = model.model.process_latent_in(who.references[0].latents)
    assert companion.shape == (1, 96, 6, 8)
    torch.testing.assert_close(companion[:, 16:32], clean)
    assert not companion[:, 32:].any()


def test_the_models_own_mask_goes_with_the_keys() -> None:
    """Qwen-Image's mask of padded prompts: what it hides stays hidden, whatever else is attended to."""
    model = dit_model("Qwen-Image")
    mask = torch.ones(1, 7)
    mask[:, -2:] = 0

    def hidden(call: AttentionCall) -> None:
        call.extend(call.key[:, :3], call.value[:, :3])

    look = Acting(frozenset(attention_sites(model)), Window(), hidden)
    results = []
    for other in (1.0, 5.0):
        tokens, values = known_prompt(attention_mask=mask.long())[0]
        tokens = tokens.clone()
        tokens[:, -2:] *= other
        results.append(sample(add_edit(model, look), positive=[[tokens, values]], cfg=1.0, steps=1))
    assert difference(*results) < 1e-5


def test_an_area_of_the_picture(flux: Any) -> None:
    (tokens, values), *_ = known_prompt()
    area = [[tokens, {**values, "area": (4, 6, 2, 2)}]]
    look = Acting(frozenset(attention_sites(flux)), Window(), lambda call: None)
    given = {"positive": [*known_prompt(3), *area], "size": (8, 10), "steps": 1}
    assert torch.equal(sample(add_edit(flux, look), **given), sample(flux, **given))
    assert {call.grid for call in look.seen} == {(4, 5), (2, 3)}
    for mechanism in CHOSEN[:2]:
        assert sample(mechanism.on(flux, (subject_for(flux),)), **given).isfinite().all()


@pytest.fixture
def traced() -> Iterator[list[Any]]:
    """A backend for the host's node that runs what was traced as it is, and keeps what it ran."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def test_a_compiled_model(traced: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's node behind ours, before them and between them: the steps in a window run as they were before
    compiling, the others compiled, and the picture is the same."""
    # As on GPUs. The function that the host takes on a CPU cannot be traced.
    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", comfy.ldm.modules.attention.attention_pytorch)
    # Tracing takes long, and as long again for each block.
    model = dit_model("FLUX.1", depth=1, depth_single_blocks=1)

    def backend(graph: Any, inputs: Any, **options: Any) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            traced.append(graph)
            return graph(*given)

        return run

    def compiled(target: Any) -> Any:
        return TorchCompileModel.execute(target, backend).args[0]

    given = {"subjects": (subject_for(model),), "strength": 1.0, "window": (0.3, 0.7)}
    first, second = (partial(mechanism.patch, **given) for mechanism in CHOSEN[:2])
    plain, exact = sample(model, steps=4), sample(second(first(model)), steps=4)
    assert difference(plain, exact) > 0.01
    whole = compiled(model)
    for patched in (second(first(whole)), second(compiled(first(model))), compiled(second(first(model)))):
        traced.clear()
        assert difference(sample(patched, steps=4), exact) < 1e-5
        assert traced
        assert difference(sample(whole, steps=4), plain) < 1e-5
    assert torch.equal(sample(model, steps=4), plain)
