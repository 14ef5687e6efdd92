"""Residual tokens: Eq. 2 to 6, the nodes, their training and their files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import pytest
import torch
from comfy.supported_models import SDXL
from hosting.random_models import SMALL as SMALL_UNET
from hosting.random_models import generator, model_of
from subject_patches.nodes.encode_prompt import EncodePromptWithSubjects
from subject_patches.nodes.residual import (
    FOLDER,
    ApplyResidualTokens,
    LoadResidualToken,
    SaveResidualToken,
    register_folder,
)
from subject_patches.nodes.train_residual import TrainResidualToken
from subject_patches.patches.prompt import SPANS_KEY
from subject_patches.patches.residual import (
    ResidualToken,
    add_residual,
    mean_shift,
    preservation_loss,
    subject_positions,
)
from subject_patches.tests.clips import FAMILIES, SMALL, small_clip
from subject_patches.tests.models import CONTEXT, sample, small_model
from subject_patches.training.residual import Tuned, filled, shipped_templates
from torch import Tensor

pytestmark = pytest.mark.usefixtures("in_inference_mode")

WIDTH = SMALL["hidden_size"]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    register_folder()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, FOLDER, ([str(tmp_path / "tokens")], {".safetensors"}))
    return tmp_path


def residual(width: int = WIDTH, vectors: int = 1, noun: str = "dog", seed: int = 3) -> ResidualToken:
    return ResidualToken(torch.randn(vectors, width, generator=generator(seed)), noun, 7)


# Equations


def test_equation_3_leaves_the_subject_free() -> None:
    original = torch.randn(2, 5, 4, generator=generator(0))
    tuned = torch.randn(2, 5, 4, generator=generator(1))
    subject = torch.zeros(2, 5, dtype=torch.bool)
    subject[0, 2] = subject[1, 4] = True
    expected, count = 0.0, 0
    for row in range(2):
        for token in range(5):
            if not subject[row, token]:
                expected += float(((tuned - original)[row, token] ** 2).sum())
                count += 1
    assert float(preservation_loss(tuned, original, subject)) == pytest.approx(expected / count)
    tuned[subject] += 100
    assert float(preservation_loss(tuned, original, subject)) == pytest.approx(expected / count)


def test_equation_5_is_the_mean_over_sentences() -> None:
    original = torch.randn(3, 6, 4, generator=generator(0))
    tuned = torch.randn(3, 6, 4, generator=generator(1))
    places = [(1, 2), (3, 4), (4, 5)]
    subject = torch.zeros(3, 6, dtype=torch.bool)
    for row, tokens in enumerate(places):
        subject[row, list(tokens)] = True
    expected = [sum((tuned - original)[row, tokens[k]] for row, tokens in enumerate(places)) / 3 for k in range(2)]
    torch.testing.assert_close(mean_shift(tuned, original, subject), torch.stack(expected))


@pytest.mark.parametrize(("vectors", "positions"), [(1, [2]), (1, [2, 5, 6]), (2, [1, 2]), (2, [1, 2, 4, 5])])
def test_equation_6_adds_it_there_and_nowhere_else(vectors: int, positions: list[int]) -> None:
    context = torch.randn(2, 8, 4, generator=generator(0))
    shift = torch.randn(vectors, 4, generator=generator(1))
    result = add_residual(context, shift, positions, 0.5)
    for token in range(8):
        added = 0.5 * shift[positions.index(token) % vectors] if token in positions else torch.zeros(4)
        torch.testing.assert_close(result[:, token], context[:, token] + added)
    others = [token for token in range(8) if token not in positions]
    assert torch.equal(result[:, others], context[:, others])


def test_a_residual_of_two_does_not_fit_one_token() -> None:
    with pytest.raises(ValueError, match="The residual is 2 vectors, one for each token of its noun, and cannot be"):
        add_residual(torch.zeros(1, 4, 4), torch.zeros(2, 4), [1])


KNOWN = {"dog": ((2, 3), (6, 7)), "brown dog": ((5, 7),), "puppy": ((8, 10),), "hot dog stand": ((12, 15),)}


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [("", [2, 6]), ("Dog ", [2, 6]), ("brown dog", [6]), ("puppy", [8, 9]), ("dogs", None), ("old dog", None)],
)
def test_which_words_become_the_subject(phrase: str, expected: list[int] | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match=rf"does not know where '{phrase}' is in its prompt \(it knows dog, brown"):
            subject_positions(KNOWN, "dog", phrase)
    else:
        assert subject_positions(KNOWN, "Dog", phrase) == expected


def test_a_phrase_around_the_noun_needs_the_noun_too() -> None:
    with pytest.raises(ValueError, match="does not know where 'dog' is"):
        subject_positions({"brown dog": ((1, 3),)}, "dog", "brown dog")
    with pytest.raises(ValueError, match=r"\(it knows none\); make it with Encode Prompt with Subjects, with 'dog'"):
        subject_positions({}, "dog")


# Applying


def encode(clip: Any, text: str, phrases: str = "dog") -> list[Any]:
    return EncodePromptWithSubjects.execute(clip, text, phrases).args[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("before", ["a ", "so " * 90], ids=["short", "over 77 tokens"])
def test_all_occurrences_in_every_family(family: str, before: str) -> None:
    clip = small_clip(family)
    plain = encode(clip, f"{before}dog and a (dog:1.2)")
    width = plain[0][0].shape[-1]
    token = residual(width)
    ((context, values),) = ApplyResidualTokens.execute(plain, token).args[0]
    changed = (context - plain[0][0])[0]
    places = [position for start, stop in values[SPANS_KEY]["dog"] for position in range(start, stop)]
    assert len(places) == 2
    assert changed.shape[0] == (77 if before == "a " else 154)
    for place in places:
        torch.testing.assert_close(changed[place], token.vectors[0], rtol=1e-4, atol=1e-4)
    changed[places] = 0
    assert not bool(changed.any())
    # In SDXL a residual is for both encoders at once.
    assert width == (2 * WIDTH if family == "SDXL" else WIDTH)
    assert torch.equal(values["pooled_output"], plain[0][1]["pooled_output"])


def test_chains_add_up_and_the_given_prompt_stays() -> None:
    clip = small_clip("SD 1.x")
    plain = encode(clip, "a dog and a cat", "dog; cat")
    kept = plain[0][0].clone()
    dog, cat = residual(), residual(noun="cat", seed=4)
    one = ApplyResidualTokens.execute(plain, dog).args[0]
    both = ApplyResidualTokens.execute(one, cat, 0.5).args[0]
    other = ApplyResidualTokens.execute(ApplyResidualTokens.execute(plain, cat, 0.5).args[0], dog).args[0]
    assert torch.equal(both[0][0], other[0][0])
    assert torch.equal(plain[0][0], kept)
    assert not torch.equal(both[0][0], one[0][0])
    assert torch.equal(ApplyResidualTokens.execute(plain, dog, 0.0).args[0][0][0], kept)


def test_what_cannot_be_applied() -> None:
    clip = small_clip("SD 1.x")
    plain = encode(clip, "a dog")
    wide = residual(768)
    with pytest.raises(ValueError, match=r"of 'dog' is for SD 1\.x \(768 wide\), .* encoded for a family 24 wide"):
        ApplyResidualTokens.execute(plain, wide)
    with pytest.raises(ValueError, match="does not know where 'cat' is in its prompt"):
        ApplyResidualTokens.execute(plain, residual(noun="cat"))
    for strength in (float("nan"), 11.0):
        with pytest.raises(ValueError, match=f"The strength is {strength}; give a number from -10 to 10"):
            ApplyResidualTokens.execute(plain, residual(), strength)


# Files


def test_a_file_of_a_few_kilobytes(folders: Path) -> None:
    token = residual(768, 2, "hot dog")
    name = SaveResidualToken.execute(token, "pets/hot").args[0]
    assert name == "pets/hot_00001_.safetensors"
    assert SaveResidualToken.execute(token, "pets/hot").args[0] == "pets/hot_00002_.safetensors"
    assert (folders / "tokens" / name).stat().st_size < 8000
    assert set(folder_paths.get_filename_list("residual_tokens")) == {name, "pets/hot_00002_.safetensors"}
    loaded = LoadResidualToken.execute(name).args[0]
    assert torch.equal(loaded.vectors, token.vectors)
    assert (loaded.noun, loaded.steps, loaded.width) == ("hot dog", 7, 768)


def test_a_file_of_another_family_is_refused(folders: Path) -> None:
    name = SaveResidualToken.execute(residual(768), "dog").args[0]
    with pytest.raises(ValueError, match=r"dog_00001_\.safetensors is for SD 1\.x \(768 wide\), but this CLIP is of a"):
        LoadResidualToken.execute(name, small_clip("SDXL"))
    own = SaveResidualToken.execute(residual(2 * WIDTH), "own").args[0]
    assert LoadResidualToken.execute(own, small_clip("SDXL")).args[0].width == 2 * WIDTH


@pytest.mark.parametrize("kind", ["no safetensors", "another file", "not finite"])
def test_what_is_no_residual(folders: Path, kind: str) -> None:
    from safetensors.torch import save_file

    path = folders / "tokens" / "broken.safetensors"
    path.parent.mkdir()
    if kind == "no safetensors":
        path.write_bytes(b"nothing")
    elif kind == "another file":
        save_file({"residual": torch.zeros(1, 4)}, path)
    else:
        SaveResidualToken.execute(ResidualToken(torch.full((1, 4), float("nan")), "dog", 1), "broken")
        (path.parent / "broken_00001_.safetensors").rename(path)
    with pytest.raises(ValueError, match=r"broken\.safetensors is no residual token \(.*\); choose another file"):
        LoadResidualToken.execute("broken.safetensors")


# Sentences


def test_the_shipped_sentences() -> None:
    templates = shipped_templates()
    assert len(set(templates)) == len(templates) >= 200
    assert all(template.count("{}") == 1 for template in templates)
    assert filled("a {} on a hill", "emblem") == "an emblem on a hill"
    assert filled("A {}", "dog") == "A dog"
    assert filled("the {}", "emblem") == "the emblem"


# Training


class Vae:
    """As much of a VAE as the node uses: averages of 8 x 8 pixels."""

    def encode(self, picture: Tensor) -> Tensor:
        planes = torch.nn.functional.avg_pool2d(picture.movedim(-1, 1), 8)
        return torch.cat([planes, planes[:, :1]], 1)


def small_xl() -> Any:
    # The host's SDXL adds six numbers of 256 each to the pooled output of the second encoder.
    config = {**SMALL_UNET, "model_channels": 64, "num_classes": "sequential", "adm_in_channels": 1536 + WIDTH}
    return model_of(SDXL, config)


def train(model: Any = None, clip: Any = None, **values: Any) -> tuple[ResidualToken, list[float]]:
    given: dict[str, Any] = {
        "model": model or small_model(),
        "clip": clip or small_clip("SD 1.x", hidden_size=CONTEXT),
        "vae": Vae(),
        "noun": "dog",
        "steps": 3,
        "learning_rate": 1e-3,
        "batch_size": 1,
        "preservation": 0.1,
        "resolution": 64,
        "captions": "a photo of a {}",
        "seed": 0,
        **values,
    }
    images = given.pop("images", [torch.rand(3, 72, 64, 3, generator=generator(8))])
    token, loss_map = TrainResidualToken.execute(images=images, **{name: [each] for name, each in given.items()}).args
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


def test_a_resumed_training_ends_where_a_whole_one_does(folders: Path) -> None:
    whole, losses = train(steps=4)
    train(steps=2, resume_name="dog")
    resumed, same = train(steps=4, resume_name="dog")
    assert torch.equal(resumed.vectors, whole.vectors)
    assert losses == same
    with pytest.raises(ValueError, match=r"'dog' was begun with another noun \(dog, now cat\)"):
        train(steps=4, resume_name="dog", noun="cat")


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
        ({"images": [torch.zeros(0, 64, 64, 3)]}, "There are no training pictures; give 3 to 5"),
        ({"images": []}, "There are no training pictures"),
        ({"steps": 0}, "The steps is 0; give a number from 1 to"),
        ({"learning_rate": float("nan")}, "The learning rate is nan; give a number from 1e-08 to 1"),
        ({"batch_size": 0}, "The batch size is 0"),
        ({"preservation": -1.0}, "The preservation is -1.0; give a number from 0 to 1000"),
        ({"tunes": "all"}, "The tunes is 'all'; choose one of text encoder, residual alone"),
        ({"loss": "x0"}, "The loss is 'x0'; choose one of what the model predicts, v"),
        ({"precision": "fp8"}, "The precision is 'fp8'; choose one of auto, bf16, fp16, fp32"),
        ({"captions": "a photo"}, "The line 'a photo' of captions needs the place of the noun once, written as {}"),
        ({"captions": "a {}\nthe {}"}, "There are 2 captions for 3 pictures; write one line for all, or one for each"),
        ({"more_templates": "a {} and a {}"}, "The line 'a {} and a {}' of more_templates needs the place"),
        ({"more_templates": "so " * 80 + "{}"}, "is longer than 75 tokens; shorten it"),
        ({"resume_name": "../dog"}, r"'\.\./dog' is no name for a training"),
        ({"vae": None}, "The vae input is None"),
    ],
)
def test_a_training_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(**values)


def test_models_of_two_families() -> None:
    with pytest.raises(ValueError, match="The model takes prompts 48 wide, but this CLIP encodes them 24 wide"):
        train(clip=small_clip("SD 1.x"))


def test_defaults_are_the_papers() -> None:
    defaults = {each.id: each.default for each in TrainResidualToken.GET_SCHEMA().inputs if hasattr(each, "default")}
    assert (defaults["steps"], defaults["learning_rate"], defaults["batch_size"]) == (3000, 1e-6, 1)
