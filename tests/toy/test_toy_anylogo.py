"""AnyLogo's tuning on the toy: what it learns from, and that what is trained is what the nodes and the LoRA show."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.sd
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from subject_patches.encoders.segmented import segmented
from subject_patches.encoders.semantic_injection import read_semantic_maps
from subject_patches.nodes.recycled_attention import RecycledSelfAttentionNode
from subject_patches.nodes.semantic_injection import SemanticInjectionNode
from subject_patches.nodes.subject import SubjectNode
from subject_patches.toy import pair_training, train_anylogo, vision
from subject_patches.toy.anylogo import Symbiosis, Tuning
from subject_patches.toy.data import Words
from subject_patches.toy.drawing import draw
from subject_patches.toy.lesson import LOGGED
from subject_patches.toy.pair_training import frozen
from subject_patches.toy.pairs import Batch, Pairs
from subject_patches.toy.runs import Peers
from subject_patches.toy.sampling import NOISE_SHAPE, Toy
from subject_patches.toy.scenes import sample_emblem, view
from subject_patches.toy.train import CHECKPOINT
from subject_patches.training.files import save_whole

from ..shared.models import difference, generator


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    """The toy's frozen model and its autoencoder."""
    return frozen(CHECKPOINT)


@pytest.fixture(scope="module")
def symbiosis(parts: tuple[Any, Any]) -> Symbiosis:
    torch.manual_seed(0)
    model = vision.Model()
    vision.initialise(model)
    # The file's precision, which is then the training's, too.
    return Symbiosis(parts[0], model.vision.half().float().eval().requires_grad_(False), Words()([""]))


@pytest.fixture
def tuning(symbiosis: Symbiosis) -> Tuning:
    torch.manual_seed(1)
    return Tuning(symbiosis.unet, 4)


@pytest.fixture(scope="module")
def pairs(parts: tuple[Any, Any]) -> Pairs:
    made = Pairs(parts[1], np.random.default_rng(5), 4, grounds=True)
    made.add(4)
    return made


def test_pairs_show_one_emblem(pairs: Pairs) -> None:
    """A scene with the emblem in it and the same without, a reference with its ground, and the same cut out."""
    batch = pairs.draw(12, generator(1))
    assert batch.latents.shape == (12, 8, 16, 16)
    assert batch.references.shape == (12, 8, 12, 12)
    assert bool((batch.emblem.amax((1, 2)) > 0.9).all())
    assert bool((batch.mask.amax((1, 2)) > 0.9).all())
    assert float(batch.pixels[:, :, 0, 0].abs().max()) < 0.01
    cells = torch.nn.functional.avg_pool2d(batch.grounds.abs().amax(1, keepdim=True), 6)[:, 0]
    assert float(cells[batch.emblem > 0.99].max()) < 0.05


def test_nothing_trained_is_the_toy_itself(symbiosis: Symbiosis, tuning: Tuning, pairs: Pairs) -> None:
    falls = symbiosis.falls(tuning, pairs.draw(4, generator(2)))
    assert set(falls) == {f"{part} at {at}" for part in ("tokens", "reference", "both", "blocked") for at in LOGGED}
    # In half precision.
    for at in LOGGED:
        assert abs(falls[f"blocked at {at}"]) < 0.005
        assert abs(falls[f"tokens at {at}"]) < 0.005
        assert abs(falls[f"reference at {at}"]) > 0.002


def test_the_loss_reaches_all_that_is_trained(symbiosis: Symbiosis, tuning: Tuning, pairs: Pairs) -> None:
    torch.manual_seed(4)
    loss = symbiosis.loss(tuning, pairs.draw(8, generator(4)))
    loss.backward()
    assert loss.isfinite()
    # What a difference's first factor learns goes through its second, which begins at zero.
    reached = [name for name, each in tuning.named_parameters() if each.grad is not None and bool(each.grad.any())]
    assert reached == [name for name, _ in tuning.named_parameters() if not name.endswith("down.weight")]
    assert all(each.grad is None for each in symbiosis.unet.parameters())


def test_what_is_trained_is_what_acts(symbiosis: Symbiosis, tuning: Tuning, tmp_path: Path) -> None:
    """One call of the host's sampler with the LoRA and the maps that the training writes, and both nodes, gives the
    training's own prediction, of the conditioned pass and of the unconditional one."""
    source = generator(6)
    with torch.no_grad():
        for each in tuning.parameters():
            each.copy_((torch.randn(each.shape, generator=source) * 0.05).half().float())
    paths = tmp_path / "maps.safetensors", tmp_path / "lora.safetensors"
    train_anylogo.write(tuning, symbiosis.vision, *paths)
    toy, semantics, lora = Toy.load(), read_semantic_maps(paths[0]), load_file(paths[1])
    drawn = draw(view(sample_emblem(np.random.default_rng(1)), np.random.default_rng(2)))
    picture = torch.from_numpy(drawn.image).float()[None] / 255
    noise = torch.randn(1, *NOISE_SHAPE, generator=source)
    seen: dict[str, Any] = {}

    def keep(arguments: dict[str, Any]) -> torch.Tensor:
        seen.update({name: arguments[name] for name in ("cond_denoised", "uncond_denoised", "sigma", "input")})
        return arguments["cond"]

    with torch.inference_mode():
        model, _ = comfy.sd.load_lora_for_models(toy.model, None, lora, 1.0, 0.0)
        mask = torch.from_numpy(drawn.masks[:1]).float()
        who = SubjectNode.made([picture], toy.vae, size=96, margin=0.15, mask=[mask]).args[0]
        patched = SemanticInjectionNode.execute(model, who, semantics, background=picture).args[0]
        patched = RecycledSelfAttentionNode.execute(patched, who, noise_level="current").args[0]
        patched.set_model_sampler_cfg_function(keep, disable_cfg1_optimization=True)
        comfy.sample.sample(
            patched, noise, 1, 4.0, "euler", "normal", toy.encode(["an emblem on grass"]), toy.encode([""]),
            torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip
    reference, sigma = who[0].references[0], seen["sigma"].view(-1, 1, 1, 1)
    timestep = patched.get_model_object("model_sampling").timestep(seen["sigma"]).long()
    looked_at = [
        segmented(reference.image, reference.pixel_mask, 96)[0],
        segmented(picture, torch.ones(1, 128, 128), 96)[0],
    ]
    batch = Batch(
        torch.zeros(2, *NOISE_SHAPE), torch.zeros(2, 16, 16), Words()(["an emblem on grass", ""]),
        *(each.clone().expand(2, *each.shape[1:]) for each in (reference.latents, reference.mask, *looked_at)),
    )  # fmt: skip
    own = torch.randn(reference.latents.shape[1:], generator=torch.Generator().manual_seed(0)).expand_as(
        batch.references
    )
    rows = {name: torch.tensor([True, False]) for name in ("tokens", "reference", "background")}
    rows["unconditional"] = torch.tensor([False, True])
    given = (seen["input"].clone() / (sigma**2 + 1) ** 0.5).expand(2, -1, -1, -1)
    with torch.no_grad(), symbiosis.tuned(tuning):
        ours = symbiosis.predicted(tuning, batch, given, timestep.expand(2), own, rows, 1.0, torch.float32)
    theirs = torch.cat([(seen["input"] - seen[name]) / sigma for name in ("cond_denoised", "uncond_denoised")])
    assert difference(theirs[:1], ours[:1]) < 2e-3
    assert difference(theirs[1:], ours[1:]) < 2e-3
    assert difference(ours[:1], ours[1:]) > 0.01


def test_a_short_run_writes_and_goes_on(symbiosis: Symbiosis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_training, "HELD_OUT", 2)
    save_whole(tmp_path / "vision.safetensors", symbiosis.vision.state_dict())
    given = Namespace(
        seed=0, batch=2, start=None, folder=tmp_path, minutes=0, steps=1, resume=False,
        checkpoint=tmp_path / "maps.safetensors",
        toy=CHECKPOINT, vision=tmp_path / "vision.safetensors", sites="decoder", keep=0.6, detached=True, rank=2,
        rate=1e-4, store=16, every=60.0, lora=tmp_path / "lora.safetensors",
    )  # fmt: skip
    train_anylogo.train(given, Peers())
    assert torch.load(tmp_path / "anylogo.state", weights_only=True)["step"] == 1
    assert read_semantic_maps(given.checkpoint).form.prompt == "kept"
    # Whatever the minutes are.
    given.resume, given.steps = True, 3
    train_anylogo.train(given, Peers())
    assert torch.load(tmp_path / "anylogo.state", weights_only=True)["step"] == 3
    # Another run may begin with what one left.
    train_anylogo.start(tuning := Tuning(symbiosis.unet, 2), given.checkpoint, given.lora)
    saved = load_file(given.lora)
    assert all(torch.equal(each.half(), saved[name]) for name, each in tuning.low_ranks.file().items())


@torch.no_grad()
def test_the_shipped_tuning_recycles(parts: tuple[Any, Any]) -> None:
    """Of held-out emblems the noise is told better with the two files than by the untuned toy that is shown the same
    reference; with the reference blocked the tuned toy is the untuned one."""
    semantics, lora = read_semantic_maps(train_anylogo.MAPS), load_file(train_anylogo.LORA)
    rank = next(len(each) for name, each in lora.items() if name.endswith("lora_down.weight"))
    tuned, untuned = Tuning(parts[0].unet, rank), Tuning(parts[0].unet, 1)
    train_anylogo.start(tuned, train_anylogo.MAPS, train_anylogo.LORA)
    lesson = Symbiosis(parts[0], semantics.vision.model.float(), Words()([""]))
    # Of fewer the error without a reference is told to a hundredth only.
    held_out = Pairs(parts[1], np.random.default_rng((2**41, 9)), 64, grounds=True)
    held_out.add(64)
    batch = held_out.draw(64, generator(9))
    after, before = lesson.falls(tuned, batch), lesson.falls(untuned, batch)
    assert after["both at 700"] < before["both at 700"] - 0.03
    assert after["both at 500"] < before["both at 500"] - 0.01
    assert all(abs(after[f"blocked at {at}"]) < 0.01 for at in LOGGED)
