"""Train Residual Token: Eq. 2 to 5 on small models, resuming, and bad input."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
import pytest
import torch
from comfy.supported_models import SD20, SDXL
from hosting.random_models import SMALL as SMALL_UNET
from hosting.random_models import generator, model_of
from subject_patches.nodes.encode_prompt import EncodePromptWithSubjects
from subject_patches.nodes.residual import (
    ApplyResidualTokens,
)
from subject_patches.nodes.train_concept import TrainConceptNode
from subject_patches.nodes.train_residual import TrainResidualToken
from subject_patches.nodes.training_inputs import settled
from subject_patches.patches.mechanisms.residual import (
    ResidualToken,
    preservation_loss,
)
from subject_patches.patches.parts.prompt import SPANS_KEY
from subject_patches.tests.shared.clips import FAMILIES, SMALL, small_clip
from subject_patches.tests.shared.forwards import counted_forwards
from subject_patches.tests.shared.models import CONTEXT, sample, small_model
from subject_patches.tests.shared.small_vaes import noting_vae, small_vae
from subject_patches.toy.family import UNET, ToyDiffusion
from subject_patches.training import images as pictures
from subject_patches.training import residual
from subject_patches.training.residual import Tuned, filled, shipped_templates
from subject_patches.training.usual import Usual, UsualWords, usual_concept, usual_residual, usual_side, usual_words
from torch import Tensor

pytestmark = pytest.mark.usefixtures("in_inference_mode", "host_folders")


# Sentences


def test_the_shipped_sentences() -> None:
    templates = shipped_templates()
    assert len(set(templates)) == len(templates) >= 200
    assert all(template.count("{}") == 1 for template in templates)
    assert filled("a {} on a hill", "emblem") == "an emblem on a hill"
    assert filled("A {}", "dog") == "A dog"
    assert filled("the {}", "emblem") == "the emblem"


# Training


def small_xl() -> Any:
    # The host's SDXL adds six numbers of 256 each to the pooled output of the second encoder.
    config = {
        **SMALL_UNET,
        "model_channels": 64,
        "num_classes": "sequential",
        "adm_in_channels": 1536 + SMALL["hidden_size"],
    }
    return model_of(SDXL, config)


def train(model: Any = None, clip: Any = None, **values: Any) -> tuple[ResidualToken, list[float]]:
    given: dict[str, Any] = {
        "model": model or small_model(),
        "clip": clip or small_clip("SD 1.x", hidden_size=CONTEXT),
        "vae": small_vae(),
        "noun": "dog",
        "steps": 3,
        "learning_rate": 1e-3,
        "batch_size": 1,
        "preservation": 0.1,
        "size": 64,
        "captions": "a photo of a {}",
        "seed": 0,
        **values,
    }
    images = given.pop("images", [torch.rand(3, 72, 64, 3, generator=generator(8))])
    token, loss_map = TrainResidualToken.trained(images, **given).args
    return token, loss_map["loss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_in_every_family(family: str) -> None:
    if family == "SDXL":
        model, clip = small_xl(), small_clip(family)
    else:
        model, clip = small_model(), small_clip(family, hidden_size=CONTEXT)
    token, losses = train(model, clip, batch_size=2)
    assert token.vectors.shape == (1, CONTEXT)
    assert bool(token.vectors.any())
    assert (token.noun, token.steps, len(losses)) == ("dog", 3, 3)
    plain = EncodePromptWithSubjects.execute(clip, "a dog on grass", "dog").args[0]
    assert ApplyResidualTokens.execute(plain, token).args[0][0][0].shape == plain[0][0].shape


def test_it_is_what_the_seed_says_and_leaves_no_trace() -> None:
    model, clip = small_model(), small_clip("SD 1.x", hidden_size=CONTEXT)
    before = sample(model), clip.encode_from_tokens(clip.tokenize("a dog")).clone()
    random = torch.random.get_rng_state()
    token, losses = train(model, clip)
    again, same = train(model, clip)
    other, _ = train(model, clip, seed=1)
    assert torch.equal(token.vectors, again.vectors)
    assert losses == same
    assert not torch.equal(token.vectors, other.vectors)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(sample(model), before[0])
    assert torch.equal(clip.encode_from_tokens(clip.tokenize("a dog")), before[1])


def test_a_resumed_training_ends_where_a_whole_one_does() -> None:
    whole, losses = train(steps=4)
    train(steps=2, resume_name="dog")
    resumed, same = train(steps=4, resume_name="dog")
    assert torch.equal(resumed.vectors, whole.vectors)
    assert losses == same
    with pytest.raises(ValueError, match=r"'dog' was begun with another noun \(dog, now cat\)"):
        train(steps=4, resume_name="dog", noun="cat")
    with pytest.raises(ValueError, match="'dog' was begun with another model, CLIP and VAE"):
        train(small_model(seed=1), steps=4, resume_name="dog")
    # As many of them, and others.
    train(steps=2, resume_name="sentences", more_templates="a {} in a hat")
    with pytest.raises(ValueError, match="'sentences' was begun with another sentences"):
        train(steps=4, resume_name="sentences", more_templates="a {} in a coat")


# What a person may set otherwise, and what a state calls it.
CHANGES: dict[str, tuple[Any, str]] = {
    "noun": ("cat", "noun"),
    "tunes": ("residual alone", "tunes"),
    "loss": ("v", "loss"),
    "images": ([torch.zeros(2, 64, 64, 3)], "pictures"),
    "captions": ("a {} on grass", "captions"),
    "learning_rate": (1e-4, "learning rate"),
    "batch_size": (2, "batch size"),
    "preservation": (0.2, "preservation"),
    "precision": ("bf16", "precision"),
    "seed": (3, "seed"),
}


def test_a_state_knows_what_it_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that changes the result, and nothing else: not how long it trains, nor what is computed again."""
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(
        residual, "train_residual_token", lambda *given: seen.append(given[-1].about) or (None, {"loss": []})
    )
    # Nothing is trained, so no picture needs its latents.
    monkeypatch.setattr(pictures, "latents_of", lambda *_: None)
    model, clip, vae = small_model(), small_clip("SD 1.x", hidden_size=CONTEXT), small_vae()

    def about(**values: Any) -> dict[str, str]:
        train(model, clip, vae=vae, resume_name="dog", **values)
        return seen[-1]

    first = about()
    assert about(steps=9, gradient_checkpointing=False) == first
    clip.clip_layer(-2)
    assert about() == {**first, "CLIP layer": "-2"}
    clip.clip_layer(None)
    vae = noting_vae(seed=1)
    assert {name for name, value in about().items() if value != first[name]} == {"model, CLIP and VAE"}
    vae = small_vae()
    for setting, (value, called) in CHANGES.items():
        other = about(**{setting: value})
        different = {name for name in first if other[name] != first[name]}
        assert called in different <= {called, "captions", "sentences", "pictures"}, setting


def test_checkpointing_is_what_is_chosen() -> None:
    forwards = []
    for chosen in (False, True):
        with counted_forwards() as counted:
            train(steps=1, tunes="residual alone", gradient_checkpointing=chosen)
        forwards.append(counted.count)
    assert forwards[1] == 2 * forwards[0] > 0


def test_preservation_keeps_the_other_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """With it the other tokens of the sentences end nearer to where they began (the loss of Eq. 4, after training)."""
    moved: list[float] = []
    residual = Tuned.residual

    def noted(learner: Tuned) -> Tensor:
        tuned = learner.kept.encoded(learner.encoder)
        moved.append(float(preservation_loss(tuned, learner.original, learner.subject)))
        return residual(learner)

    monkeypatch.setattr(Tuned, "residual", noted)
    for preservation in (0.0, 100.0):
        train(steps=15, learning_rate=1e-2, preservation=preservation)
    free, kept = moved
    assert kept < 0.3 * free


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(precision: str) -> None:
    exact, losses = train(precision="fp32")
    token, half = train(precision=precision)
    assert half == pytest.approx(losses, rel=0.1)
    assert token.vectors.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(token.vectors, exact.vectors).item() > 0.8


def test_the_residual_alone_learns_what_the_pictures_show() -> None:
    """The denoising loss falls, at the same noise, from what the plain noun gives."""
    values: dict[str, Any] = {"tunes": "residual alone", "batch_size": 4}
    _, first = train(**values, steps=1, learning_rate=1e-8)
    token, losses = train(**values, steps=40, learning_rate=0.3)
    assert losses[0] == first[0]
    assert token.vectors.shape == (1, CONTEXT)
    _, plain = train(**values, steps=40, learning_rate=1e-8)
    assert sum(losses[20:]) < sum(plain[20:])


def test_a_noun_of_several_tokens_gets_a_vector_for_each() -> None:
    clip = small_clip("SD 1.x", hidden_size=CONTEXT)
    token, _ = train(clip=clip, noun="garden gnome")
    spans = EncodePromptWithSubjects.execute(clip, "a garden gnome", "garden gnome").args[0][0][1][SPANS_KEY]
    count = sum(stop - start for start, stop in spans["garden gnome"])
    assert token.vectors.shape == (count, CONTEXT)
    assert count > 1


def test_one_picture_works_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train(images=[torch.rand(1, 64, 64, 3)], steps=1)
    assert "Train Residual Token has one picture" in caplog.text


def test_cancel_leaves_the_models() -> None:
    model, clip = small_model(), small_clip("SD 1.x", hidden_size=CONTEXT)
    weights = {name: each.clone() for name, each in clip.patcher.model.state_dict().items()}
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(model, clip)
    after = clip.patcher.model.state_dict()
    assert all(torch.equal(weights[name], after[name]) for name in weights)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"noun": " "}, "The noun is empty; write what the subject is"),
        ({"noun": "(dog:1.2)"}, r"The noun is '\(dog:1\.2\)'; write words alone"),
        (
            {"images": [torch.zeros(0, 64, 64, 3)]},
            r"There is nothing in the images: its shape is \(0, 64, 64, 3\); connect",
        ),
        ({"images": []}, "There are no training pictures; give 3 to 5"),
        ({"steps": -1}, "The steps are -1; give a number from 0 to"),
        ({"learning_rate": float("nan")}, "The learning_rate is nan; give a number from 0 to 1"),
        ({"batch_size": -1}, "The batch_size is -1"),
        ({"preservation": -1.0}, "The preservation is -1.0; give a number from 0 to 1000"),
        ({"tunes": "all"}, "The tunes are 'all'; choose one of text encoder, residual alone"),
        ({"loss": "x0"}, "The loss is 'x0'; choose one of what the model predicts, v"),
        ({"precision": "fp8"}, "The precision is 'fp8'; choose one of auto, bf16, fp16, fp32"),
        ({"captions": "a photo"}, "The line 'a photo' of captions needs the place of the noun once, written as {}"),
        ({"captions": "a {}\nthe {}"}, "There are 2 captions for 3 pictures; write one line for all, or one for each"),
        ({"more_templates": "a {} and a {}"}, "The line 'a {} and a {}' of more_templates needs the place"),
        ({"more_templates": "so " * 80 + "{}"}, "is longer than 75 tokens; shorten it"),
        ({"resume_name": "../dog"}, r"'\.\./dog' is no name for a training"),
        ({"resume_name": "é" * 101}, "at most 200 bytes [(]a plain letter is one, é two, 犬 three[)]"),
        ({"resume_name": "x" * 201}, "x' is no name for a training; write .*, at most 200 bytes .*, and no folder"),
        ({"vae": None}, "The vae input is None"),
        (
            {"vae": small_vae(16)},
            r"of the shape \(1, 16, 8, 8\), but this model takes pictures of 4 channels; use the VAE",
        ),
    ],
)
def test_a_training_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(**values)


def test_models_of_two_families() -> None:
    with pytest.raises(ValueError, match="The model takes prompts 48 wide, but this CLIP encodes them 24 wide"):
        train(clip=small_clip("SD 1.x"))


def test_what_is_taken_by_itself_suits_the_model(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing that is right for the toy alone reaches a real family, whose values are the papers' and authors'."""
    toy = model_of(ToyDiffusion, UNET)
    second = {**SMALL_UNET, "context_dim": 1024, "use_linear_in_transformer": True, "model_channels": 64}
    for model, side in ((small_model(), 512), (small_xl(), 1024), (model_of(SD20, second), 512)):
        assert usual_side(model) == side
        assert usual_residual(model, alone=False) == Usual(3000, 1, side, 1e-6)
        assert usual_concept(model) == Usual(900, 2, side, 2e-5, 10 * 2e-5, 2e-5)
        assert usual_concept(model, batch=6) == Usual(900, 6, side, 6e-5, 10 * 6e-5, 6e-5)
        assert usual_concept(model, rate=1e-6) == Usual(900, 2, side, 1e-6, 10 * 1e-6, 1e-6)
        assert usual_words(model) == UsualWords(True, True, True, True)
    sign = {"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([-1.0, 1.0])}
    assert usual_side(model_of(SD20, second, hints=sign)) == 768
    assert usual_residual(toy, alone=True) == Usual(40, 8, 128, 0.1)
    assert usual_concept(toy, batch=6) == Usual(50, 2, 128, 5e-3, 3e-2, 3e-2)
    assert usual_words(toy) == UsualWords(False, False, False, False)
    with caplog.at_level(logging.INFO):
        assert settled(Usual(0, 3, 0, 0.0), usual_residual(toy, alone=False), "Train") == Usual(150, 3, 128, 1e-3)
    assert "Train: 150 steps of 3 pictures at 128 x 128, learning rate 0.001." in caplog.text
    for node in (TrainConceptNode, TrainResidualToken):
        settings = {each.id: each for each in node.GET_SCHEMA().inputs}
        names = {"steps", "batch_size", "learning_rate", "word_learning_rate", "size"} & settings.keys()
        assert {settings[name].default for name in names} == {0}
        assert [name for name in names if name.endswith("rate") and settings[name].advanced] == []
