"""What of other packs acts in a companion's pass: what belongs to the model, nothing that belongs to the picture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Upsample
from comfy.ldm.supir.supir_patch import SUPIRPatch
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_tomesd import TomePatchModel
from subject_patches.patches.engine.companion import owner_of, silenced
from subject_patches.patches.engine.passes import own_randomness
from subject_patches.patches.mechanisms.semantic_injection import injected
from subject_patches.tests.shared.dit_models import dit_model
from subject_patches.tests.shared.mechanisms import MECHANISMS, Mechanism
from subject_patches.tests.shared.models import (
    auxiliary_prompt,
    difference,
    inputs_of,
    integrated,
    prompt,
    randn,
    recycled,
    routed,
    sample,
    subject,
    subject_for,
    swapped,
    trajectory,
)
from subject_patches.tests.shared.peers import (
    OPENINGS,
    couple,
    of_its_own_prompt,
    shared_by_index,
    shared_in_the_batch,
    step_cache,
)
from torch import Tensor

FEW = 0.003
LENDING = [m for m in MECHANISMS if m.name in ("recycled self-attention", "multi-source swap", "dual branch")]
over_lending = pytest.mark.parametrize("mechanism", LENDING, ids=lambda m: m.name)


@over_lending
@pytest.mark.parametrize("opening", OPENINGS)
def test_a_step_cache_of_another_pack_is_the_same_cold_and_warm(opening: str, mechanism: Mechanism, model: Any) -> None:
    # Another shape of latents than a companion's would begin the cache afresh; the same shape would be skipped.
    run = {"steps": 5, "size": (6, 8)}
    ours = mechanism.on(model, size=(6, 8))
    sample(ours, **run)
    warm = sample(step_cache(ours, opening), **run)
    cold = sample(step_cache(mechanism.on(model, size=(6, 8)), opening), **run)
    assert torch.equal(cold, warm)
    assert torch.equal(sample(mechanism.on(step_cache(model, opening), size=(6, 8)), **run), cold)
    assert difference(cold, sample(step_cache(model, opening), **run)) > FEW


@over_lending
@pytest.mark.parametrize("share", [shared_in_the_batch, shared_by_index])
def test_sharing_inside_the_batch(share: Callable[[Any], Any], mechanism: Mechanism, model: Any) -> None:
    run = {"batch": 2, "steps": 3}
    result = sample(share(mechanism.on(model)), **run)
    assert torch.equal(sample(mechanism.on(share(model)), **run), result)
    assert difference(result, sample(share(model), **run)) > FEW
    assert difference(result, sample(mechanism.on(model), **run)) > FEW


def features_of(patch: Callable[[Any], Any], model: Any) -> list[Tensor]:
    """What a reference lends under another pack's patch, in every layer and step."""
    who = subject_for(model)
    sample(recycled(patch(model), (who,)))
    entries = who.cache._entries.values()
    return [tensor for entry in entries for parts in entry.features.values() for tensor in parts.values()]


def test_what_belongs_to_the_picture_leaves_a_reference_as_it_is(model: Any) -> None:
    alone = features_of(lambda given: given, model)
    hinted = partial(resampling, hint=randn(1, 1, 8, 8))
    for patch in (shared_by_index, shared_in_the_batch, partial(of_its_own_prompt, lengths=(7,)), couple, hinted):
        lent = features_of(patch, model)
        assert len(lent) == len(alone)
        assert all(torch.equal(one, other) for one, other in zip(lent, alone, strict=True)), patch


def hypernetwork(model: Any) -> Any:
    """As the host's Hypernetwork node patches self-attention: the keys and values of each token by itself."""
    clone = model.clone()
    clone.set_model_attn1_patch(lambda query, key, value, _: (query, key * 1.2, value * 0.9))
    return clone


def resampling(model: Any, hint: Tensor | None = None) -> Any:
    """As patches that are for the layers of one class: what upsampling gives, scaled, with a hint of the picture's own
    size where one is given."""

    def upsample(layer: Any, x: Tensor, _emb: Tensor, _context: Any, _options: Any, shape: Any, *_: Any) -> Tensor:
        return layer(x, output_shape=shape) * 0.7 if hint is None else layer(x, output_shape=shape) + hint

    clone = model.clone()
    clone.set_model_patch((Upsample, upsample), "forward_timestep_embed_patch")
    return clone


def merging(model: Any) -> Any:
    return TomePatchModel.execute(model, 0.5).args[0]


@pytest.mark.parametrize("patch", [hypernetwork, merging, resampling])
def test_what_belongs_to_the_model_acts_on_a_reference_too(patch: Callable[[Any], Any], model: Any) -> None:
    lent, alone = features_of(patch, model), features_of(lambda given: given, model)
    assert any(difference(one, other) > FEW for one, other in zip(lent, alone, strict=True))


@pytest.mark.parametrize(
    ("name", "place"), [("Qwen-Image", "double_block"), ("Z-Image", "noise_refiner"), ("FLUX.1", "post_input")]
)
def test_what_controls_the_picture_leaves_a_reference_as_it_is(name: str, place: str) -> None:
    """As the host's nodes for control and styles do in transformers, with other patches of theirs."""
    model = dit_model(name)

    def controlled(given: Any) -> Any:
        clone = given.clone()
        clone.set_model_patch(lambda streams: {**streams, "img": streams["img"] * 1.2}, place)
        clone.set_model_patch(lambda query, key, value, **_: {"k": key * 1.2}, "attn1_patch")
        return clone

    lent, alone = features_of(controlled, model), features_of(lambda given: given, model)
    assert all(torch.equal(one, other) for one, other in zip(lent, alone, strict=True))
    assert difference(sample(controlled(model)), sample(model)) > FEW


def supir(model: Any) -> Any:
    """The host's SUPIR node, with adapters that only scale what they are given."""

    def adapter(_: None, *given: Tensor, control_scale: float) -> Tensor:
        return 0.9 * control_scale * torch.cat(given[::-1], 1)

    control = SimpleNamespace(model=SimpleNamespace(control_model=lambda *_: [None] * 40))
    clone = model.clone()
    SUPIRPatch(control, [adapter] * 40, randn(1, 4, 8, 8), 1.0, 1.0).register(clone)
    return clone


def test_supir_leaves_a_reference_as_it_is(model: Any) -> None:
    lent, alone = features_of(supir, model), features_of(lambda given: given, model)
    assert all(torch.equal(one, other) for one, other in zip(lent, alone, strict=True))
    assert difference(sample(supir(model)), sample(model)) > FEW


def test_a_replacement_that_knows_its_own_prompt_only(model: Any) -> None:
    other = prompt(31, 5)
    patches = (
        lambda given: routed(given, (subject(),), reference_conditioning=other),
        lambda given: swapped(given, *paths(), lambda2=0.5, layout_conditioning=other, reference_conditioning=other),
        lambda given: integrated(given, auxiliary=auxiliary_prompt(length=5)),
    )
    for ours in patches:
        result = sample(of_its_own_prompt(ours(model), lengths=(7,)))
        assert torch.equal(sample(ours(of_its_own_prompt(model, lengths=(7,)))), result)
        assert difference(result, sample(of_its_own_prompt(model, lengths=(7,)))) > FEW


def paths() -> list[Any]:
    return [trajectory(randn(1, 4, 8, 8, seed=seed)) for seed in (1, 2)]


def test_an_error_that_is_no_misfit_ends_the_run(model: Any) -> None:
    def out_of_memory(*_: Any) -> None:
        raise comfy.model_management.OOM_EXCEPTION("no room")

    def cancelled(*_: Any) -> None:
        raise comfy.model_management.InterruptProcessingException

    for fail in (out_of_memory, cancelled):
        clone = model.clone()
        clone.set_model_attn1_patch(fail)
        with pytest.raises((comfy.model_management.OOM_EXCEPTION, comfy.model_management.InterruptProcessingException)):
            sample(recycled(clone))


def test_a_pass_gives_every_generator_that_it_seeds_its_state_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU it seeds no other device: PyTorch's own function seeds each that there is."""
    seeded: list[int] = []
    for module, name in ((torch.cuda, "manual_seed_all"), (torch.mps, "manual_seed"), (torch.xpu, "manual_seed_all")):
        monkeypatch.setattr(module, name, seeded.append)
    state, drawn = torch.get_rng_state(), []
    for _ in range(2):
        with own_randomness(torch.device("cpu")):
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert torch.equal(torch.get_rng_state(), state)
    assert not seeded


def test_context_windows_do_not_cut_a_companion(model: Any) -> None:
    manual = (6, 2, "standard_static", 1, False, "pyramid", 3, False)
    windowed = ContextWindowsManualNode.execute(model, *manual).args[0]
    with inputs_of(model) as calls:
        sample(recycled(windowed), size=(6, 14))
    assert {tuple(call["x"].shape[-2:]) for call in calls if len(call["x"]) == 1} == {(6, 8)}
    assert all(call["x"].shape[-1] < 14 for call in calls if len(call["x"]) == 2)


def test_patches_of_ours_have_one_owner_whatever_room_they_are_of() -> None:
    assert owner_of(silenced) == owner_of(partial(injected, replaces=True)) != owner_of(couple)
