"""Training an ICO concept: its prompts, what learns, what is saved, and what the host's own loaders make of it."""

from __future__ import annotations

import io
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from host import Server
from hosting.random_models import generator
from PIL import Image
from safetensors.torch import load_file, save_file
from subject_patches.nodes.auxiliary_prompt import AuxiliaryPromptNode
from subject_patches.nodes.concept_inputs import Further
from subject_patches.nodes.train_concept import PRESETS, VERSIONS, TrainConceptNode
from subject_patches.tests.clips import FAMILIES, small_clip
from subject_patches.tests.models import CONTEXT, difference, sample, small_model
from subject_patches.tests.test_bad_input import OTHERS
from subject_patches.training.concept import ConceptPrompts, as_lora, hold_start, key_value_weights
from subject_patches.training.concept_files import Concept, ConceptFiles
from subject_patches.training.concept_run import Settings, Shots, train_concept
from subject_patches.training.concept_words import RARE, SCHEMES, Scheme, template
from subject_patches.training.copies import loaded, with_gradients
from subject_patches.training.denoising import Denoiser
from subject_patches.training.images import varied, with_mirrored
from subject_patches.training.loop import Training
from subject_patches.training.regularisation import Regularisation, regularised
from subject_patches.training.state import StateFile
from subject_patches.training.text import TextEncoder
from subject_patches.training.usual import UsualWords
from torch import Tensor

pytestmark = pytest.mark.usefixtures("in_inference_mode")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    names = {**folder_paths.folder_names_and_paths, "embeddings": ([str(tmp_path / "embeddings")], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", names)
    return tmp_path


class Vae:
    """Latents of four channels from a picture's own colours."""

    def encode(self, picture: Tensor) -> Tensor:
        planes = torch.nn.functional.avg_pool2d(picture.movedim(-1, 1), 8) * 8 - 4
        return torch.cat([planes, planes.mean(1, keepdim=True)], 1)


def matching_clip(seed: int = 0) -> Any:
    """A CLIP whose contexts are as wide as the small model takes them."""
    return small_clip("SD 1.x", seed, hidden_size=CONTEXT)


def pictures(count: int = 3) -> Tensor:
    return torch.rand(count, 64, 64, 3, generator=generator(1))


def latents(count: int = 3, versions: int = 2) -> Tensor:
    return torch.randn(count, versions, 4, 8, 8, generator=generator(2)) * 3


def trained(
    steps: int = 3,
    state: StateFile | None = None,
    preset: str = "plain",
    others: Regularisation | None = None,
    **values: Any,
) -> Concept:
    rates = {"learning_rate": 1e-3, "word_learning_rate": 1e-2, "concept_learning_rate": 1e-2}
    settings = Settings("dog", SCHEMES[preset], steps, **rates, **values)
    return train_concept(small_model(), matching_clip(), latents(), settings, state, others)


# Eq. 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_equation_2(family: str, preset: str) -> None:
    scheme = replace(SCHEMES[preset], template=False)
    with with_gradients():
        encoder = TextEncoder(small_clip(family))
        with loaded(encoder.patcher):
            prompts = ConceptPrompts(encoder, "red dog", scheme, 2, torch.Generator().manual_seed(0))
            contexts, pooled = prompts.encode(encoder, [0, 1])
            plain, plain_pooled = encoder.encode(encoder.tokenize(""))
    assert contexts.shape == (2, 77, plain.shape[-1])
    assert pooled.shape == (2, plain_pooled.shape[-1])
    words = encoder.tokenize(f"{scheme.words} red dog".strip())
    fixed = len(scheme.words.split())
    for name in words:
        first, second = prompts.tokens(0)[name][0], prompts.tokens(1)[name][0]
        assert len(first) == len(second) == 77
        concept, mine = prompts.vectors[f"concept.{name}"], prompts.vectors.get(f"picture 0.{name}", ())
        right = [
            words[name][0][0],
            *mine[: scheme.before],
            *words[name][0][1 : 1 + fixed],
            *concept,
            *words[name][0][1 + fixed : 3 + fixed],
            *mine[scheme.before :],
            words[name][0][3 + fixed],
        ]
        for (token, weight), expected in zip(first, right, strict=False):
            assert weight == 1
            if isinstance(expected, Tensor):
                assert torch.equal(token, expected)
            else:
                assert token == expected[0]
        assert [token for token, _ in first[len(right) :]] == [encoder.tokenize("")[name][0][-1][0]] * (77 - len(right))
        # The concept's vectors are every picture's, its own are not.
        place = 1 + scheme.before + fixed
        assert all(torch.equal(second[place + n][0], concept[n]) for n in range(scheme.concept))
        assert len(concept) == scheme.concept
        assert len(mine) == scheme.before + scheme.after
        assert not scheme.before or not torch.equal(first[1][0], second[1][0])


def test_the_papers_presets() -> None:
    counts = {name: (s.before, s.after, s.concept) for name, s in SCHEMES.items()}
    assert counts["plain"] == (4, 2, 2)
    assert counts["for dual-branch"] == (1, 1, 3)
    assert tuple(SCHEMES) == PRESETS


def test_what_learns_and_what_does_not() -> None:
    with with_gradients():
        encoder = TextEncoder(matching_clip())
        with loaded(encoder.patcher):
            prompts = ConceptPrompts(encoder, "dog", SCHEMES["plain"], 3, torch.Generator().manual_seed(0))
            context, _ = prompts.encode(encoder, [0, 2])
            context.square().mean().backward()
    learnt = {name for name, vectors in prompts.vectors.items() if vectors.grad is not None}
    assert learnt == {"concept.l", "picture 0.l", "picture 2.l"}
    assert all(each.grad is None for each in encoder.model.parameters())
    with with_gradients():
        network = small_model().model.diffusion_model
        weights = key_value_weights(network)
    cross = [name for name, _ in network.named_parameters() if "attn2.to_k" in name or "attn2.to_v" in name]
    assert list(weights) == cross
    assert len(weights) == 2 * 7


def begun(scheme: Scheme, family: str = "SD 1.x") -> tuple[ConceptPrompts, dict[str, Tensor]]:
    """The prompts of two pictures, and the vocabulary of each encoder."""
    with with_gradients():
        encoder = TextEncoder(small_clip(family))
        with loaded(encoder.patcher):
            prompts = ConceptPrompts(encoder, "dog", scheme, 2, torch.Generator().manual_seed(0))
            inner = {name: getattr(encoder.model, f"clip_{name}").transformer for name in prompts.frame}
            return prompts, {name: each.get_input_embeddings().weight.float() for name, each in inner.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_words_begin_as_in_the_authors_code(family: str) -> None:
    """The pictures' as "A photo of a" and ". .", the concept's as the vocabulary's numbers that the code has."""
    prompts, vocabularies = begun(SCHEMES["plain"], family)
    numbers = small_clip(family).tokenize("A photo of a . .")
    for name, vocabulary in vocabularies.items():
        words = vocabulary[[token for token, _ in numbers[name][0][1:7]]]
        assert torch.equal(prompts.vectors[f"picture 0.{name}"], words)
        assert torch.equal(prompts.vectors[f"picture 1.{name}"], words)
        assert torch.equal(prompts.vectors[f"concept.{name}"], vocabulary[[47629, 42170]])
    prompts, vocabularies = begun(SCHEMES["for dual-branch"])
    assert torch.equal(prompts.vectors["concept.l"], vocabularies["l"][[43514, 47629, 42170]])
    assert template(1, 1) == "a ."
    assert template(2, 0) == "photo of"
    assert template(3, 2) == "photo of a . ."
    assert template(6, 1) == ". . a photo of a ."
    assert len(RARE) == len(set(RARE)) == 3


def test_words_begin_at_random_and_as_the_noun() -> None:
    scheme = Scheme(6, 3, 4, template=False, rare=False)
    prompts, vocabularies = begun(scheme)
    ((token, _),) = prompts.noun["l"]
    assert torch.equal(prompts.vectors["concept.l"], vocabularies["l"][token].repeat(4, 1))
    first, second = (prompts.vectors[f"picture {number}.l"] for number in (0, 1))
    assert len(first) == 9
    assert not torch.equal(first, second)


def test_the_start_token_is_held() -> None:
    """Its keys and values are what the weights make of them, but give the weights no gradient; all others do."""
    with with_gradients():
        found = []
        for held in (False, True):
            network = small_model().model.diffusion_model
            if held:
                hold_start(network)
            weights = key_value_weights(network)
            layers = {name: network.get_submodule(name.removesuffix(".weight")) for name in weights}
            context = torch.randn(2, 5, CONTEXT, generator=generator(4))
            outputs = {name: layer(context) for name, layer in layers.items()}
            sum(each.square().sum() for each in outputs.values()).backward()
            found.append(({n: each.detach() for n, each in outputs.items()}, {n: w.grad for n, w in weights.items()}))
        free, held = found
        assert len(free[0]) == 14
        for name, output in free[0].items():
            assert torch.equal(output, held[0][name])
            start = 2 * torch.einsum("bo,bi->oi", output[:, 0], context[:, 0])
            torch.testing.assert_close(free[1][name] - start, held[1][name])


def test_what_learns_at_which_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    run = Training.run
    monkeypatch.setattr(Training, "run", lambda self, *args: seen.append(self.optimizer) or run(self, *args))
    settings = Settings("dog", SCHEMES["for dual-branch"], 1, 2, 1e-3, 1e-2, 2e-3)
    train_concept(small_model(), matching_clip(), latents(2, 1), settings)
    (optimizer,) = seen
    assert isinstance(optimizer, torch.optim.AdamW)
    groups = [
        (group["lr"], group["weight_decay"], [tuple(p.shape) for p in group["params"]])
        for group in optimizer.param_groups
    ]
    assert [(rate, decay, len(shapes)) for rate, decay, shapes in groups] == [
        (1e-3, 0.01, 14),
        (2e-3, 0.01, 1),
        (1e-2, 0.01, 2),
    ]
    assert groups[1][2] == [(3, CONTEXT)]
    assert groups[2][2] == [(2, CONTEXT)] * 2


# Regularisation


def others(count: int = 2) -> Regularisation:
    drawn = torch.randn(count, 2, 4, 8, 8, generator=generator(6))
    return Regularisation(drawn, [f"a dog on {number}" for number in range(count)])


def test_half_of_a_step_is_for_regularisation() -> None:
    source = torch.Generator().manual_seed(0)
    assert {regularised(4, source) for _ in range(20)} == {2}
    assert {regularised(1, source) for _ in range(20)} == {0, 1}
    assert {regularised(3, source) for _ in range(20)} == {1, 2}


def test_regularisation_pictures_have_their_own_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step of four two are the concept's, with prompts that learn, and two others, with captions that do not."""
    seen = []
    monkeypatch.setattr(Denoiser, "loss", lambda self, *args: seen.append(args[:3]) or args[1].sum())
    with with_gradients():
        clip = matching_clip()
        encoder, denoiser = TextEncoder(clip), Denoiser(small_model(), torch.float32, False)
        with loaded(encoder.patcher, denoiser.patcher):
            prompts = ConceptPrompts(encoder, "dog", SCHEMES["plain"], 3, torch.Generator().manual_seed(0))
            Shots(denoiser, encoder, prompts, latents(), others()).loss(4, torch.Generator().manual_seed(1)).backward()
            captions = torch.cat([encoder.encode(encoder.tokenize(each))[0] for each in others().captions])
    ((shown, contexts, pooled),) = seen
    assert shown.shape == (4, 4, 8, 8)
    assert contexts.shape == (4, 77, CONTEXT)
    assert pooled.shape[0] == 4
    for row in (0, 1):
        assert any(torch.equal(shown[row], each) for each in latents().flatten(0, 1))
    for row in (2, 3):
        (number,) = [n for n, each in enumerate(others().latents) if any(torch.equal(shown[row], v) for v in each)]
        assert torch.equal(contexts[row], captions[number])
    assert prompts.vectors["concept.l"].grad is not None


def test_regularisation_changes_what_is_learnt() -> None:
    plain, beside, again = trained(2), trained(2, others=others()), trained(2, others=others())
    assert beside.losses == again.losses
    assert beside.losses != plain.losses


def test_the_mirror() -> None:
    picture = pictures(1)
    first, second = with_mirrored([picture])
    assert torch.equal(first, picture)
    assert torch.equal(second, picture[:, :, torch.arange(63, -1, -1)])


def test_what_is_left_to_the_model_and_the_preset() -> None:
    plain, written = SCHEMES["plain"], SCHEMES["fixed template"]
    real, toys = UsualWords(True, True, True, True), UsualWords(False, False, False, False)
    left = Further().settled(plain, real)
    assert left.scheme(plain) == plain
    assert (left.mirrored, left.start_token) == ("half the time", "held")
    left = Further().settled(written, toys)
    assert left.scheme(written) == replace(written, template=False, rare=False)
    assert (left.mirrored, left.start_token) == ("never", "trained")
    given = Further(words_before=6, concept_words=1, picture_words_begin="at random", mirrored="never")
    given = given.settled(plain, real)
    assert given.scheme(plain) == Scheme(6, 2, 1, template=False)
    assert (given.mirrored, given.start_token) == ("never", "held")


# A training


def test_it_learns_and_the_given_models_stay_as_they_are() -> None:
    model, clip = small_model(), matching_clip()
    before = [{n: w.clone() for n, w in each.model.state_dict().items()} for each in (model, clip.patcher)]
    settings = Settings("dog", SCHEMES["plain"], 40, 3, 1e-2, 1e-2)
    concept = train_concept(model, clip, latents(1, 1), settings)
    losses = concept.losses["loss"]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    for weights, each in zip(before, (model, clip.patcher), strict=True):
        assert all(torch.equal(weight, weights[name]) for name, weight in each.model.state_dict().items())


def test_a_cancelled_training_goes_on(folders: Path) -> None:
    whole = trained(6)
    state = StateFile("mine", {"noun": "dog"})
    trained(3, state)
    again = trained(6, state)
    assert again.losses == whole.losses
    for one, other in ((again.embedding, whole.embedding), (again.difference, whole.difference)):
        assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(precision: str) -> None:
    exact, rough = trained(2), trained(2, precision=precision, gradient_checkpointing=False)
    assert rough.losses["loss"][0] == pytest.approx(exact.losses["loss"][0], rel=0.05)
    assert {each.dtype for each in rough.embedding.values()} == {torch.float32}


# The node and its files


def made(folders: Path, model: Any, clip: Any, **values: Any) -> tuple[Any, ...]:
    given = {"noun": "dog", "name": "my_dog", "preset": "for dual-branch", "steps": 2, "size": 64}
    rates = {"learning_rate": 1e-2, "word_learning_rate": 1e-2}
    return TrainConceptNode.trained([pictures()], model, clip, Vae(), **{**given, **rates, **values}).args


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 1e-4},
        {"word_learning_rate": 1e-3},
        {"batch_size": 1},
        {"smallest_crop": 0.5},
        {"image_noise": 0.0},
        {"precision": "bf16"},
        {"seed": 3},
        {"mirrored": "never"},
        {"start_token": "trained"},
        {"words_before": 3},
        {"regularisation_images": [torch.zeros(1, 64, 64, 3)]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_training_is_not_resumed_with_other_settings(changed: dict[str, Any], folders: Path) -> None:
    model, clip = small_model(), matching_clip()
    made(folders, model, clip, resume_name="shield")
    named = {"regularisation_images": "regularisation"}.get(next(iter(changed)), next(iter(changed)).replace("_", " "))
    with pytest.raises(ValueError, match=f"'shield' was begun with another {named} "):
        made(folders, model, clip, resume_name="shield", **changed)


def test_a_training_is_not_resumed_on_another_model(folders: Path) -> None:
    made(folders, small_model(), matching_clip(), resume_name="shield")
    # Of the same weights, and loaded for sampling since.
    same = small_model()
    sample(same)
    made(folders, same, matching_clip(), resume_name="shield")
    weight = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_q.weight"
    tuned = small_model()
    assert tuned.add_patches({weight: (torch.ones_like(tuned.model.state_dict()[weight]),)})
    for model, clip in (
        (small_model(seed=1), matching_clip()),
        (small_model(), matching_clip(1)),
        (tuned, matching_clip()),
    ):
        with pytest.raises(ValueError, match="'shield' was begun with another model and CLIP"):
            made(folders, model, clip, resume_name="shield")


def test_the_hosts_loaders_take_the_files(folders: Path) -> None:
    model, clip = small_model(), matching_clip()
    patched, passed, words, losses = made(folders, model, clip)
    assert words == "embedding:my_dog dog"
    assert passed is clip
    assert len(losses["loss"]) == 2
    files = ConceptFiles("my_dog")
    assert sorted(path.relative_to(folders) for path in folders.rglob("*.safetensors")) == sorted(
        path.relative_to(folders) for path in (files.embedding, files.lora)
    )
    # Each is there once: words as an embedding, projections as a LoRA.
    assert set(load_file(files.embedding)) == {"clip_l"}
    assert not any(name.startswith("clip") for name in load_file(files.lora))
    loaded_model, _ = comfy.sd.load_lora_for_models(model, None, load_file(files.lora), 1.0, 0.0)
    assert len(loaded_model.patches) == 14
    assert torch.equal(sample(loaded_model), sample(patched))
    assert difference(sample(patched), sample(model)) > 1e-3
    # By its name in a prompt.
    tokenizer = clip.tokenizer.clip_l
    tokenizer.embedding_directory = str(files.embedding.parent)
    tokens = [token for token, _ in clip.tokenize(f"a {words} on grass")["l"][0]]
    vectors = load_file(files.embedding)["clip_l"]
    assert vectors.shape == (3, CONTEXT)
    assert all(torch.equal(token, vector) for token, vector in zip(tokens[2:5], vectors, strict=True))
    # Its own files it may replace.
    made(folders, model, clip, steps=1)


def test_the_difference_is_what_was_trained() -> None:
    weights = {"a.attn2.to_k.weight": torch.full((2, 2), 1.5)}
    found = as_lora({"a.attn2.to_k.weight": torch.ones(2, 2)}, weights, torch.eye(2))
    # Two thin matrices would be no smaller.
    assert torch.equal(found["diffusion_model.a.attn2.to_k.diff"], torch.full((2, 2), 0.5, dtype=torch.float16))


def test_versions_of_a_picture() -> None:
    picture = pictures(1)
    versions = varied(picture, VERSIONS, 0.5, 0.1, generator(3))
    assert len(versions) == VERSIONS
    assert torch.equal(versions[0], picture)
    assert {tuple(each.shape) for each in versions} == {(1, 64, 64, 3)}
    assert all(float(each.min()) >= 0 and float(each.max()) <= 1 for each in versions)
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(versions))
    still = varied(torch.full((1, 32, 32, 3), 0.5), 4, 0.5, 0.0, generator(3))
    torch.testing.assert_close(torch.stack(still), torch.full((4, 1, 32, 32, 3), 0.5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"noun": " "}, "The noun is empty; write what"),
        ({"noun": "(dog:1.2)"}, "The noun is '[(]dog:1.2[)]'; write words alone"),
        ({"name": "a/b"}, "'a/b' is no name for a concept; write letters"),
        ({"preset": "none"}, "The preset is 'none'; choose one of plain, for dual-branch, fixed template"),
        ({"learning_rate": float("nan")}, "The learning rate is nan; give a number from 0 to 1"),
        ({"smallest_crop": 2.0}, "The smallest crop is 2.0"),
        ({"steps": -1}, "The steps is -1; give a number from 0"),
        ({"size": 8}, "The size is 8; give a number from 64"),
        ({"batch_size": 65}, "The batch size is 65; give a number from 0 to 64"),
        ({"precision": "int4"}, "The precision is 'int4'; choose one of auto, bf16"),
        ({"noun": "dog " * 80}, "is too long for a prompt; write one or two words"),
        ({"words_before": 33}, "The number of words before is 33; give a number from 0 to 32"),
        ({"concept_words": 0}, "The number of words of the concept is 0; give a number from 1 to 32"),
        ({"concept_learning_rate": -1.0}, "The learning rate of the concept's words is -1.0"),
        ({"mirrored": "twice"}, "The mirrored is 'twice'; choose one of auto, half the time, never"),
        (
            {"regularisation_images": [torch.zeros(3, 64, 64, 3)], "regularisation_captions": "a dog\na {}"},
            "There are 2 regularisation captions for 3 regularisation pictures; write one line for all",
        ),
        (
            {"regularisation_images": [torch.zeros(1, 64, 64, 3)], "regularisation_captions": "so " * 90 + "{}"},
            "The regularisation caption 'so .* dog' is longer than 75 tokens; shorten it",
        ),
    ],
)
def test_what_it_refuses(folders: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(folders, small_model(), matching_clip(), **values)


def test_other_families_and_other_files_are_refused(folders: Path) -> None:
    with pytest.raises(ValueError, match=r"family SVD_img2vid; it knows SD 1\.x, SD 2\.x, SDXL"):
        made(folders, OTHERS["SVD_img2vid"], matching_clip())
    with pytest.raises(
        ValueError, match=f"contexts 24 wide but this model takes {CONTEXT}; connect the CLIP of the same"
    ):
        made(folders, small_model(), small_clip("SD 1.x"))
    with pytest.raises(ValueError, match="The clip input is None"):
        made(folders, small_model(), None)
    (folders / "embeddings").mkdir(exist_ok=True)
    save_file({"clip_l": torch.zeros(1, 4)}, folders / "embeddings" / "mine.safetensors")
    with pytest.raises(ValueError, match=r"already another file .*mine\.safetensors; give the concept another name"):
        made(folders, small_model(), matching_clip(), name="mine")


def test_a_concept_of_another_family_in_a_prompt(folders: Path) -> None:
    clip = matching_clip()
    (folders / "embeddings").mkdir()
    clip.tokenizer.clip_l.embedding_directory = str(folders / "embeddings")
    save_file({"clip_h": torch.zeros(2, 1024)}, folders / "embeddings" / "other.safetensors")
    with pytest.raises(ValueError, match=r"embedding 'other' has vectors of 1024 .* takes 768; .* same family"):
        AuxiliaryPromptNode.execute(clip, "embedding:other dog on grass", "embedding:other dog")
    with pytest.raises(ValueError, match=r"no embedding 'none' in the embeddings folder"):
        AuxiliaryPromptNode.execute(clip, "embedding:none dog on grass", "embedding:none dog")


def test_a_cancel_ends_it(folders: Path) -> None:
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        trained(3)


# On a stock server

CHECKPOINT = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "subject-patches-toy.safetensors"}}


def test_a_server_trains_it_and_its_own_nodes_use_it(server: Server) -> None:
    """Trained by one queued workflow, and then loaded by another with the host's nodes alone."""
    name = "concept_of_the_tests"
    settings = {"noun": "emblem", "name": name, "preset": "plain", "steps": 2, "size": 128, "batch_size": 1}
    rates = {"learning_rate": 0.02, "word_learning_rate": 0.05, "smallest_crop": 0.75, "image_noise": 0.02}
    rest = {"seed": 0, "precision": "auto", "gradient_checkpointing": False, "resume_name": ""}
    links = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "images": ["2", 0]}
    train = {"class_type": "SubjectPatchesTrainConcept", "inputs": {**links, **settings, **rates, **rest}}
    picture = {"class_type": "EmptyImage", "inputs": {"width": 128, "height": 128, "batch_size": 2, "color": 12345}}
    server.queue({"1": CHECKPOINT, "2": picture, "3": train})

    def used(strength: float, words: str) -> bytes:
        def encoded(text: str) -> dict[str, Any]:
            return {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": text}}

        lora = {"lora_name": f"{name}.safetensors", "strength_model": strength, "model": ["1", 0]}
        chosen = {"seed": 1, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
        given = {"model": ["2", 0], "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0]}
        size = {"width": 128, "height": 128, "batch_size": 1}
        outputs = server.queue(
            {
                "1": CHECKPOINT,
                "2": {"class_type": "LoraLoaderModelOnly", "inputs": lora},
                "3": encoded(f"{words} on grass"),
                "4": encoded(""),
                "5": {"class_type": "EmptyLatentImage", "inputs": size},
                "6": {"class_type": "KSampler", "inputs": {**given, **chosen}},
                "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
                "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "concept"}},
            }
        )
        with Image.open(io.BytesIO(server.fetch(outputs["8"]["images"][0]))) as image:
            return image.convert("RGB").tobytes()

    pictures = [used(1.0, f"embedding:{name} emblem"), used(1.0, "emblem"), used(0.0, f"embedding:{name} emblem")]
    # Both of its parts count.
    assert len(set(pictures)) == 3
    log = server.log.read_text(encoding="utf-8")
    assert f"embedding:{name} does not exist" not in log
    assert not re.findall("lora key not loaded: (.*)", log)
