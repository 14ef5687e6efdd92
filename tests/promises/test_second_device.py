"""Every mechanism on a device that is not the CPU, as far as a machine without one can show it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import BasicScheduler
from hosting.random_models import generator
from subject_patches.nodes.align import AlignReferenceNode
from subject_patches.nodes.attention_inspector import AttentionInspectorNode, RecordAttentionNode
from subject_patches.nodes.auxiliary_prompt import AuxiliaryPromptNode
from subject_patches.nodes.encode_prompt import EncodePromptWithSubjects
from subject_patches.nodes.layout import LayoutNode
from subject_patches.nodes.residual import ApplyResidualTokens
from subject_patches.nodes.router import RouteByMasksNode
from subject_patches.nodes.self_recurrence import SelfRecurrenceNode
from subject_patches.nodes.step_blended_guider import StepBlendedGuiderNode
from subject_patches.nodes.subject import SubjectNode
from subject_patches.nodes.train_concept import TrainConceptNode
from subject_patches.nodes.train_residual import TrainResidualToken
from subject_patches.nodes.trajectory import InvertToTrajectoryNode
from subject_patches.tests.shared.dit_models import dit_model
from subject_patches.tests.shared.mechanisms import MECHANISMS, OF_EACH_KIND, Mechanism
from subject_patches.tests.shared.models import (
    difference,
    integrated,
    known_prompt,
    laid_out,
    latent_noise,
    mask_router,
    recycled,
    routed,
    sample,
    small_model,
    swapped,
)
from subject_patches.tests.shared.second_device import CPU, DEVICE, SecondDevice
from subject_patches.toy.sampling import Toy
from torch import Tensor

RUN: dict[str, Any] = {"batch": 2, "steps": 2}


@pytest.fixture
def there() -> Iterator[Any]:
    """The same model, whose device is another while the test runs."""
    with SecondDevice():
        model = small_model()
        model.load_device = DEVICE
        yield model
        comfy.model_management.unload_model_and_clones(model)


def test_the_rules_are_those_of_a_device() -> None:
    here = torch.ones(2, 2)
    with SecondDevice():
        moved = here.to(DEVICE)
        assert (moved.device, here.device.type, moved[0].device, (moved + 1).device) == (DEVICE, "cpu", DEVICE, DEVICE)
        assert torch.zeros(2, device=moved.device).device == torch.zeros_like(moved).device == DEVICE
        assert (moved.cpu() + here).device.type == "cpu"
        assert (moved * torch.tensor(2.0)).device == DEVICE
        for mixed in (lambda: here + moved, lambda: here * moved[0, 0], lambda: torch.cat([here, moved])):
            with pytest.raises(RuntimeError, match="two devices"):
                mixed()
        with pytest.raises(TypeError, match="copy it to the CPU"):
            moved.numpy()
        moved += 1
        assert here.tolist() == [[1.0, 1.0], [1.0, 1.0]]


# Eight references are on a device as two are.
@pytest.mark.parametrize("mechanism", [m for m in MECHANISMS if "eight" not in m.name], ids=lambda m: m.name)
def test_a_run(mechanism: Mechanism, model: Any, there: Any) -> None:
    """With a prompt for the whole and one for an area, and recorded, so that what looks inside runs there, too."""
    run = {**RUN, "positive": [*known_prompt(), *known_prompt(3, area=(4, 6, 2, 1), strength=1.0)]}
    right = sample(mechanism.on(model, strength=0.6), **run)
    patched, record = RecordAttentionNode.execute(mechanism.on(there, strength=0.6)).args
    result = sample(patched, **run)
    assert difference(result, right) < 1e-4
    assert all(parameter.device == DEVICE for parameter in there.model.diffusion_model.parameters())
    AttentionInspectorNode.execute(record, torch.rand(2, 64, 64, 3), show="all")


def _placed(mode: str) -> Mechanism:
    return Mechanism(
        f"references {mode}",
        lambda model, who, strength, *_: routed(model, who, mask_router(1), strength=strength, positions=mode),
    )


# Krea repeats heads, SD 3.5 has a second attention of the picture, Wan cross-attentions.
TRANSFORMERS = [
    *((name, each) for name in ("FLUX.1", "SD 3.5", "Krea 2", "Wan") for each in OF_EACH_KIND),
    *(("FLUX.1", _placed(mode)) for mode in ("centred", "beside", "damped")),
]


@pytest.mark.parametrize(("name", "mechanism"), TRANSFORMERS, ids=[f"{name}, {m.name}" for name, m in TRANSFORMERS])
def test_a_run_of_a_transformer(name: str, mechanism: Mechanism) -> None:
    right = sample(mechanism.on(dit_model(name), strength=0.6), **RUN)
    with SecondDevice():
        model = dit_model(name)
        model.load_device = DEVICE
        patched, record = RecordAttentionNode.execute(mechanism.on(model, strength=0.6)).args
        result = sample(patched, **RUN)
        AttentionInspectorNode.execute(record, torch.rand(2, 64, 64, 3), show="all")
        assert all(parameter.device == DEVICE for parameter in model.model.diffusion_model.parameters())
        comfy.model_management.unload_model_and_clones(model)
    assert difference(result, right) < 1e-4


@pytest.mark.parametrize("guidance", ["shared", "own"])
def test_a_branch_under_a_mask_by_cfg_plus_plus(guidance: str, model: Any, there: Any) -> None:
    mask = torch.ones(1, 1, 8, 8)
    mask[..., :4] = 0
    run = {**RUN, "steps": 3, "sampler": "dpmpp_2m_cfg_pp", "cfg": 0.7, "mask": mask, "latent": torch.ones(2, 4, 8, 8)}
    results = [sample(integrated(each, guidance=guidance), **run) for each in (there, model)]
    assert difference(*results) < 1e-4


# What else computes


@pytest.fixture
def toy() -> Iterator[Toy]:
    """The toy with all its parts there."""
    with SecondDevice():
        toy = Toy.load()
        toy.model.load_device = toy.clip.patcher.load_device = toy.vae.patcher.load_device = toy.vae.device = DEVICE
        yield toy
        for patcher in (toy.model, toy.clip.patcher, toy.vae.patcher):
            comfy.model_management.unload_model_and_clones(patcher)


def picture_by_all(toy: Toy, device: torch.device) -> Tensor:
    """From a picture and a prompt on `device` to one that two models made, with nodes of this pack all the way."""
    picture = torch.rand(1, 128, 128, 3, generator=generator(2)).to(device)
    mask = torch.ones(1, 128, 128).to(device)
    mask[:, :, 70:] = 0
    # Smaller and larger than it is.
    for size in (96, 128):
        picture, mask, *_ = AlignReferenceNode.execute(picture, mask, mask.new_ones(1, size, size)).args
    (one,) = SubjectNode.made([picture], toy.vae, "emblem", 128, 0.1, [mask]).args
    prompts = AuxiliaryPromptNode.execute(toy.clip, "an emblem on grass", "emblem", noun="star").args
    latent = {"samples": toy.vae.encode(picture).to(device)}
    sigmas = BasicScheduler.execute(toy.model, "normal", 2, 1.0).args[0]
    path, last, *_ = InvertToTrajectoryNode.execute(toy.model, latent, sigmas, toy.clip, fixed_point_rounds=1).args
    layout = LayoutNode.execute(128, 128, "emblem", mask=mask).args[0]
    router = RouteByMasksNode.execute(masks=mask).args[0]
    model = routed(recycled(laid_out(toy.model, layout), one, region_mask=mask), one, router, strength=0.7)
    swap = swapped(model, path, path, blend_mask=mask)
    second = integrated(swap, concept=prompts[0], auxiliary=prompts[1])
    guider = StepBlendedGuiderNode.execute(
        model=model,
        personalised_model=second,
        positive=prompts[1],
        personalised_positive=prompts[0],
        negative=toy.encode([""]),
        first_steps=1,
        cfg=3.0,
        personalised_cfg=3.0,
    ).args[0]
    (sampler,) = SelfRecurrenceNode.execute(comfy.samplers.sampler_object("euler"), 2, 0.0, 1.0, 0).args
    noise = latent_noise(1, (16, 16), 5, channels=8)
    result = guider.sample(noise, last["samples"], sampler, sigmas, disable_pbar=True, seed=1)
    return toy.vae.decode(result)


@pytest.fixture(scope="module")
def by_the_cpu() -> Tensor:
    with torch.inference_mode():
        return picture_by_all(Toy.load(), CPU)


@pytest.mark.usefixtures("in_inference_mode")
@pytest.mark.parametrize("device", [CPU, DEVICE], ids=str)
def test_subjects_prompts_and_guiders(device: torch.device, by_the_cpu: Tensor, toy: Toy) -> None:
    """The picture is the CPU's. With --gpu-only the host hands pictures and masks on as they are there."""
    assert difference(picture_by_all(toy, device), by_the_cpu) < 1e-3


@pytest.mark.usefixtures("in_inference_mode", "host_folders")
@pytest.mark.parametrize("tunes", ["text encoder", "residual alone"])
def test_a_residual_token(tunes: str, toy: Toy) -> None:
    given = {
        "images": torch.rand(2, 128, 128, 3, generator=generator(2)).to(DEVICE),
        **{"model": toy.model, "clip": toy.clip, "vae": toy.vae, "noun": "emblem", "steps": 1, "learning_rate": 1e-3},
        **{"batch_size": 1, "preservation": 0.1, "size": 128, "captions": "an {}", "seed": 0, "tunes": tunes},
        **{"gradient_checkpointing": True, "precision": "fp32", "resume_name": "there"},
    }
    token, losses = TrainResidualToken.execute(**{name: [each] for name, each in given.items()}).args
    assert len(losses["loss"]) == 1
    (conditioning,) = EncodePromptWithSubjects.execute(toy.clip, "an emblem on grass", "emblem").args
    (shifted,) = ApplyResidualTokens.execute(conditioning, token).args
    assert not torch.equal(shifted[0][0], conditioning[0][0])


@pytest.mark.usefixtures("in_inference_mode", "host_folders")
def test_a_concept(toy: Toy) -> None:
    pictures = torch.rand(2, 128, 128, 3, generator=generator(2)).to(DEVICE)
    given = {"noun": "emblem", "name": "there", "preset": "plain", "steps": 2, "size": 128}
    given |= {"precision": "fp32", "resume_name": "there", "regularisation_images": [pictures]}
    given |= {"mirrored": "half the time", "start_token": "held"}
    model, _, _, losses = TrainConceptNode.trained([pictures], toy.model, toy.clip, toy.vae, **given).args
    assert len(losses["loss"]) == 2
    assert toy.sample(["an emblem"], [1], model, steps=1).isfinite().all()
