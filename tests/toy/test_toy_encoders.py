"""How the toy's vision model and subject encoder are trained: pieces of it, and that what is trained is what acts."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from subject_patches.encoders.segmented import segmented
from subject_patches.encoders.subject_encoder import read_subject_encoder
from subject_patches.nodes.recycled_attention import RecycledSelfAttentionNode
from subject_patches.nodes.subject import SubjectNode
from subject_patches.nodes.subject_encoder import EncodeSubjectsNode
from subject_patches.patches.parts.masks import resize_mask
from subject_patches.toy import subjects, vision
from subject_patches.toy.data import Words
from subject_patches.toy.drawing import draw
from subject_patches.toy.lesson import LOGGED
from subject_patches.toy.pair_training import ENCODER, frozen
from subject_patches.toy.pairs import Batch, Pairs
from subject_patches.toy.runs import Peers
from subject_patches.toy.sampling import NOISE_SHAPE, Toy
from subject_patches.toy.scenes import sample_emblem, view
from subject_patches.toy.train import CHECKPOINT
from subject_patches.toy.train_diffusion import encode_text
from subject_patches.toy.train_subjects import write
from torch import Tensor

from ..shared.models import difference, generator


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    """The toy's frozen model and its autoencoder."""
    return frozen(CHECKPOINT)


@pytest.fixture(scope="module")
def stage(parts: tuple[Any, Any]) -> subjects.Stage:
    torch.manual_seed(0)
    model = vision.Model()
    vision.initialise(model)
    return subjects.Stage(parts[0], model.vision.eval().requires_grad_(False), Words()([""]))


@pytest.fixture(scope="module")
def modules(stage: subjects.Stage) -> Any:
    torch.manual_seed(1)
    return subjects.encoder_modules(stage.unet)


@pytest.fixture(scope="module")
def pairs(parts: tuple[Any, Any]) -> Pairs:
    made = Pairs(parts[1], np.random.default_rng(5), 4)
    made.add(4)
    return made


def test_a_still_view_is_the_cut_out_subject() -> None:
    """Around the box, upright, zero outside the mask; other views differ from it and from one another."""
    drawn = [draw(view(sample_emblem(np.random.default_rng(1)), np.random.default_rng(2)))]
    given = vision.stacked(drawn, np.random.default_rng(3))
    still, again = vision.looked_at(*given, still=True), vision.looked_at(*given, still=True)
    assert torch.equal(still, again)
    assert still.shape == (1, 3, 96, 96)
    assert not still[0, :, 0, 0].any()
    assert still[0, :, 48, 48].any()
    torch.manual_seed(0)
    assert not torch.equal(vision.looked_at(*given), vision.looked_at(*given))


def test_alike_vectors_cost_less() -> None:
    """The comparison is won by views of one picture that are nearest, the painting by the right pixels."""
    apart = torch.eye(4)
    assert vision.comparison_loss(apart, apart) < 1e-3
    assert vision.comparison_loss(apart, apart.roll(1, 0)) > 5
    pixels, hidden = torch.rand(2, 3, 96, 96), torch.rand(2, 144) < 0.5
    true = torch.nn.functional.unfold(pixels, 8, stride=8).mT
    assert vision.painting_loss(true, pixels, hidden) == 0
    assert vision.painting_loss(true + 1, pixels, hidden) == pytest.approx(1)


def test_training_the_vision_model_writes_and_goes_on(tmp_path: Path) -> None:
    """A short run writes what `load` reads; another goes on where it stopped."""
    given = Namespace(
        seed=0, batch=8, start=None, folder=tmp_path, minutes=0, resume=False, checkpoint=tmp_path / "v.safetensors"
    )
    vision.train(given, Peers(), measured=1)
    (first,) = [torch.load(tmp_path / "vision.state", weights_only=True)["step"]]
    assert vision.load(given.checkpoint)(torch.zeros(1, 3, 96, 96))[0].isfinite().all()
    given.resume, given.minutes = True, 0.02
    vision.train(given, Peers(), measured=1)
    assert torch.load(tmp_path / "vision.state", weights_only=True)["step"] > first


def test_pairs_show_one_emblem(pairs: Pairs) -> None:
    """A row is a scene with the emblem somewhere in it, a caption, and a cut-out reference of it."""
    batch = pairs.draw(16, generator(1))
    assert batch.latents.shape == (16, 8, 16, 16)
    assert (batch.emblem.amax((1, 2)) > 0.9).all()
    assert (batch.mask.amax((1, 2)) > 0.9).all()
    corner = batch.pixels[:, :, 0, 0]
    assert (corner.abs() < 0.01).all()


def test_nothing_shown_is_the_toy_itself(stage: subjects.Stage, modules: Any, pairs: Pairs) -> None:
    """With tokens and references away the prediction is the U-Net's own; the tokens begin as nothing."""
    batch = pairs.draw(2, generator(2))
    timestep, noise = torch.tensor([400, 700]), torch.randn(batch.latents.shape, generator=generator(3))
    noisy = stage.noised(batch.latents, noise, timestep)
    none, every = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        context = encode_text(stage.text, batch.tokens)
        plain = stage.unet(noisy, timestep, context=context).float()
    with torch.no_grad():

        def shown(tokens: Tensor, reference: Tensor) -> Tensor:
            rows = {"unconditional": none, "tokens": tokens, "reference": reference}
            return stage.prediction(modules, batch, noisy, timestep, rows)

        assert difference(shown(none, none), plain) < 0.03
        assert torch.equal(shown(every, none), shown(none, none))
        assert difference(shown(none, every), plain) > 0.05


def test_the_loss_reaches_all_that_is_trained(stage: subjects.Stage, modules: Any, pairs: Pairs) -> None:
    """Every part gets a gradient, and the toy none."""
    torch.manual_seed(4)
    loss = stage.loss(modules, pairs.draw(6, generator(4)))
    loss.backward()
    assert loss.isfinite()
    reached = {name.split(".")[0] for name, each in modules.named_parameters() if each.grad is not None}
    assert reached == {"qformer", "image", "reference_net", "reference"}
    assert float(modules.reference_net.input_blocks[0][0].weight.grad[:, -1].abs().sum()) > 0
    assert all(each.grad is None for each in stage.unet.parameters())
    modules.zero_grad()
    falls = stage.falls(modules, pairs.draw(4, generator(5)))
    assert set(falls) == {f"{part} at {at}" for part in ("tokens", "reference", "both") for at in LOGGED}
    assert falls["tokens at 500"] == 0


def test_what_is_trained_is_what_acts(stage: subjects.Stage, modules: Any, tmp_path: Path) -> None:
    """One call of the host's sampler with the file that the training writes gives the training's own prediction, of the
    conditioned pass and of the unconditional one."""
    source = generator(6)
    with torch.no_grad():
        for site in modules.cross:
            weight = modules.image.at(site).to_v.weight
            weight.copy_(torch.randn(weight.shape, generator=source) * 0.1)
    # The file's precision, which is then the training's, too.
    modules.half().float()
    stage.vision.half().float()
    write(modules, stage.vision, tmp_path / "toy.safetensors")
    toy, encoder = Toy.load(), read_subject_encoder(tmp_path / "toy.safetensors")
    drawn = draw(view(sample_emblem(np.random.default_rng(1)), np.random.default_rng(2)))
    picture = torch.from_numpy(drawn.image).float()[None] / 255
    noise = torch.randn(1, *NOISE_SHAPE, generator=source)
    seen: dict[str, Tensor] = {}

    def keep(arguments: dict[str, Any]) -> Tensor:
        seen.update({name: arguments[name] for name in ("cond_denoised", "uncond_denoised", "sigma", "input")})
        return arguments["cond"]

    with torch.inference_mode():
        mask = torch.from_numpy(drawn.masks[:1]).float()
        who = SubjectNode.made([picture], toy.vae, size=96, margin=0.15, mask=[mask]).args[0]
        who = EncodeSubjectsNode.execute(who, encoder, toy.vae).args[0]
        patched = RecycledSelfAttentionNode.execute(toy.model, who).args[0]
        patched.set_model_sampler_cfg_function(keep, disable_cfg1_optimization=True)
        import comfy.sample

        comfy.sample.sample(
            patched, noise, 1, 4.0, "euler", "normal", toy.encode(["an emblem on grass"]), toy.encode([""]),
            torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip
        sigma = seen["sigma"].view(-1, 1, 1, 1)
        timestep = patched.get_model_object("model_sampling").timestep(seen["sigma"])
        reference = who[0].references[0]
        planes, inside = segmented(reference.image, reference.pixel_mask, 96)
        latents = toy.vae.encode((planes / 2 + 0.5).movedim(1, -1))
        small = resize_mask(inside, (12, 12))
        words = Words()(["an emblem on grass", ""])
        batch = Batch(
            torch.zeros(2, *NOISE_SHAPE), torch.zeros(2, 16, 16), words, latents.expand(2, -1, -1, -1),
            small.expand(2, -1, -1), planes.expand(2, -1, -1, -1),
        )  # fmt: skip
        rows = {"unconditional": torch.tensor([False, True]), "tokens": torch.ones(2), "reference": torch.ones(2)}
        rows = {name: each.bool() for name, each in rows.items()}
        given = (seen["input"] / (sigma**2 + 1) ** 0.5).expand(2, -1, -1, -1)
        ours = stage.prediction(modules, batch, given, timestep.expand(2), rows, torch.float32)
        theirs = torch.cat([(seen["input"] - seen[name]) / sigma for name in ("cond_denoised", "uncond_denoised")])
    assert difference(theirs[:1], ours[:1]) < 2e-3
    assert difference(theirs[1:], ours[1:]) < 2e-3
    assert difference(ours[:1], ours[1:]) > 0.01


def test_the_shipped_encoder_brings_its_vision_model() -> None:
    """So its training, and AnyLogo's, go on from a fresh clone without the hour that made it."""
    brought = read_subject_encoder(ENCODER).vision.model.state_dict()
    loaded = vision.load(ENCODER).state_dict()
    assert loaded.keys() == brought.keys()
    assert all(torch.equal(loaded[name], each.float()) for name, each in brought.items())


@pytest.mark.skipif(not ENCODER.is_file(), reason="the toy's encoder is not in this checkout")
@pytest.mark.usefixtures("in_inference_mode")
def test_the_shipped_encoder_lowers_the_error_of_held_out_emblems(parts: tuple[Any, Any]) -> None:
    """Of the noise in them, against no reference: what moves before any picture shows it."""
    encoder = read_subject_encoder(ENCODER)
    stage = subjects.Stage(parts[0], encoder.vision.model, Words()([""]))
    held_out = Pairs(parts[1], np.random.default_rng((2**41, 7)), 24)
    held_out.add(24)
    falls = stage.falls(encoder.modules, held_out.draw(24, generator(7)))
    assert max(falls["both at 500"], falls["both at 700"]) < -0.05
