"""Training an ICO concept: what learns, what is saved, what the host's own loaders make of it, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from safetensors.torch import load_file, save_file
from subject_patches.nodes.auxiliary_prompt import AuxiliaryPromptNode
from subject_patches.tests.shared.clips import small_clip
from subject_patches.tests.shared.concepts import latents, made, matching_clip, trained
from subject_patches.tests.shared.forwards import counted_forwards
from subject_patches.tests.shared.models import CONTEXT, difference, sample, small_model
from subject_patches.tests.shared.other_families import OTHERS
from subject_patches.tests.shared.small_vaes import noting_vae, small_vae
from subject_patches.training.concept import as_lora
from subject_patches.training.concept_files import ConceptFiles
from subject_patches.training.concept_run import Settings, train_concept
from subject_patches.training.concept_words import SCHEMES
from subject_patches.training.loop import Training
from subject_patches.training.state import StateFile

pytestmark = pytest.mark.usefixtures("in_inference_mode")


def test_it_learns_and_the_given_models_stay_as_they_are() -> None:
    model, clip = small_model(), matching_clip()
    before = [{n: w.clone() for n, w in each.model.state_dict().items()} for each in (model, clip.patcher)]
    settings = Settings("dog", SCHEMES["plain"], 40, 3, 1e-2, 1e-2)
    concept = train_concept(model, clip, latents(1, 1), settings)
    losses = concept.losses["loss"]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    for weights, each in zip(before, (model, clip.patcher), strict=True):
        assert all(torch.equal(weight, weights[name]) for name, weight in each.model.state_dict().items())


def test_a_cancelled_training_goes_on(host_folders: Path) -> None:
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


@pytest.mark.usefixtures("host_folders")
def test_choices_reach_the_training() -> None:
    """Each changes what is learnt, by itself."""
    plain = {"mirrored": "never", "start_token": "trained", "steps": 3}

    def losses(chosen: dict[str, str]) -> tuple[float, ...]:
        return tuple(made(small_model(), matching_clip(), **plain | chosen)[3]["loss"])

    assert losses({}) == losses({})
    assert len({losses(each) for each in ({}, {"mirrored": "half the time"}, {"start_token": "held"})}) == 3


@pytest.mark.usefixtures("host_folders")
def test_checkpointing_is_what_is_chosen() -> None:
    forwards = []
    for chosen in (False, True):
        with counted_forwards() as counted:
            made(small_model(), matching_clip(), name=f"dog_{chosen}", steps=1, gradient_checkpointing=chosen)
        forwards.append(counted.count)
    assert forwards[1] == 2 * forwards[0] > 0


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


def test_the_difference_is_what_was_trained() -> None:
    weights = {"a.attn2.to_k.weight": torch.full((2, 2), 1.5)}
    found = as_lora({"a.attn2.to_k.weight": torch.ones(2, 2)}, weights, torch.eye(2))
    # Two thin matrices would be no smaller.
    assert torch.equal(found["diffusion_model.a.attn2.to_k.diff"], torch.full((2, 2), 0.5, dtype=torch.float16))


# The node and its files


# What a person may set otherwise, and what the refusal calls it.
CHANGES: dict[str, tuple[Any, str]] = {
    "learning_rate": (1e-4, "learning rate"),
    "word_learning_rate": (1e-3, "word learning rate"),
    "batch_size": (1, "batch size"),
    "smallest_crop": (0.5, "smallest crop"),
    "image_noise": (0.0, "image noise"),
    "precision": ("bf16", "precision"),
    "seed": (3, "seed"),
    "mirrored": ("never", "mirrored"),
    "start_token": ("trained", "start token"),
    "words_before": (3, "words before"),
    "regularisation_images": ([torch.zeros(1, 64, 64, 3)], "regularisation"),
}


def test_a_training_is_not_resumed_with_other_settings(host_folders: Path) -> None:
    model, clip = small_model(), matching_clip()
    made(model, clip, resume_name="shield")
    for setting, (value, called) in CHANGES.items():
        with pytest.raises(ValueError, match=f"'shield' was begun with another {called} "):
            made(model, clip, resume_name="shield", **{setting: value})


def test_a_training_is_not_resumed_on_another_model(host_folders: Path) -> None:
    made(small_model(), matching_clip(), resume_name="shield")
    # Of the same weights, and loaded for sampling since.
    same = small_model()
    sample(same)
    made(same, matching_clip(), resume_name="shield")
    weight = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_q.weight"
    tuned = small_model()
    assert tuned.add_patches({weight: (torch.ones_like(tuned.model.state_dict()[weight]),)})
    for model, clip in (
        (small_model(seed=1), matching_clip()),
        (small_model(), matching_clip(1)),
        (tuned, matching_clip()),
    ):
        with pytest.raises(ValueError, match="'shield' was begun with another model, CLIP and VAE"):
            made(model, clip, resume_name="shield")
    with pytest.raises(ValueError, match="'shield' was begun with another model, CLIP and VAE"):
        made(small_model(), matching_clip(), vae=noting_vae(seed=1), resume_name="shield")
    deeper = matching_clip()
    deeper.clip_layer(-2)
    with pytest.raises(ValueError, match="'shield' was begun with another CLIP layer"):
        made(small_model(), deeper, resume_name="shield")


def test_a_concept_of_another_sampling_or_layer_is_trained_anew(host_folders: Path) -> None:
    """What stands before the node is no weight, and decides the training all the same."""
    words = [made(small_model(), matching_clip()) and ConceptFiles("my_dog").about()]
    as_v = ModelSamplingDiscrete().patch(small_model(), "v_prediction", zsnr=False)[0]
    deeper = matching_clip()
    deeper.clip_layer(-2)
    for model, clip in ((as_v, matching_clip()), (small_model(), deeper)):
        made(model, clip)
        words.append(ConceptFiles("my_dog").about())
    assert len({str(each) for each in words}) == 3


def test_the_hosts_loaders_take_the_files(host_folders: Path) -> None:
    model, clip = small_model(), matching_clip()
    patched, passed, words, losses = made(model, clip)
    assert words == "embedding:my_dog dog"
    assert passed is clip
    assert len(losses["loss"]) == 2
    files = ConceptFiles("my_dog")
    assert sorted(path.relative_to(host_folders) for path in host_folders.rglob("*.safetensors")) == sorted(
        path.relative_to(host_folders) for path in (files.embedding, files.lora)
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
    made(model, clip, steps=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"noun": " "}, "The noun is empty; write what"),
        ({"noun": "(dog:1.2)"}, "The noun is '[(]dog:1.2[)]'; write words alone"),
        ({"name": "a/b"}, "'a/b' is no name for a concept; write letters"),
        ({"name": "x" * 500}, f"'{'x' * 400}…' is no name for a concept; write .*, at most 200 bytes [(]"),
        ({"preset": "none"}, "The preset is 'none'; choose one of plain, for dual-branch, fixed template"),
        ({"learning_rate": float("nan")}, "The learning_rate is nan; give a number from 0 to 1"),
        ({"smallest_crop": 2.0}, "The smallest_crop is 2.0"),
        ({"steps": -1}, "The steps are -1; give a number from 0"),
        ({"size": 8}, "The size is 8; give a number from 64"),
        ({"batch_size": 65}, "The batch_size is 65; give a number from 0 to 64"),
        ({"precision": "int4"}, "The precision is 'int4'; choose one of auto, bf16"),
        ({"noun": "dog " * 80}, "is too long for a prompt; write one or two words"),
        (
            dict.fromkeys(("words_before", "words_after", "concept_words"), 32),
            "The noun '.*' and the 96 learnt words are too long for a prompt together; write a noun of one",
        ),
        ({"words_before": 33}, "The words_before is 33; give a number from 0 to 32"),
        ({"concept_words": 0}, "The concept_words are 0; give a number from 1 to 32"),
        ({"concept_learning_rate": -1.0}, "The concept_learning_rate is -1.0"),
        ({"mirrored": "twice"}, "The mirrored is 'twice'; choose one of auto, half the time, never"),
        (
            {"regularisation_images": [torch.zeros(3, 64, 64, 3)], "regularisation_captions": "a dog\na {}"},
            "There are 2 regularisation captions for 3 regularisation pictures; write one line for all",
        ),
        (
            {"regularisation_images": [torch.zeros(1, 64, 64, 3)], "regularisation_captions": "so " * 90 + "{}"},
            "The regularisation caption 'so .* …' is longer than 75 tokens; shorten it",
        ),
    ],
)
def test_what_it_refuses(host_folders: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(small_model(), matching_clip(), **values)


def test_other_families_and_other_files_are_refused(host_folders: Path) -> None:
    with pytest.raises(ValueError, match=r"family SVD_img2vid; it knows SD 1\.x, SD 2\.x, SDXL"):
        made(OTHERS["SVD_img2vid"], matching_clip())
    with pytest.raises(ValueError, match=f"takes prompts {CONTEXT} wide, but this CLIP encodes them 24 wide"):
        made(small_model(), small_clip("SD 1.x"))
    with pytest.raises(ValueError, match="The clip input is None"):
        made(small_model(), None)
    with pytest.raises(
        ValueError, match=r"of the shape \(1, 16, 8, 8\), but this model takes pictures of 4 channels; use"
    ):
        made(small_model(), matching_clip(), vae=small_vae(16))
    (host_folders / "embeddings").mkdir(exist_ok=True)
    save_file({"clip_l": torch.zeros(1, 4)}, host_folders / "embeddings" / "mine.safetensors")
    with pytest.raises(ValueError, match=r"already another file .*mine\.safetensors; give the concept another name"):
        made(small_model(), matching_clip(), name="mine")


def test_a_concept_of_another_family_in_a_prompt(host_folders: Path) -> None:
    clip = matching_clip()
    (host_folders / "embeddings").mkdir()
    clip.tokenizer.clip_l.embedding_directory = str(host_folders / "embeddings")
    save_file({"clip_h": torch.zeros(2, 1024)}, host_folders / "embeddings" / "other.safetensors")
    with pytest.raises(ValueError, match=r"embedding 'other' has vectors of 1024 .* takes 768; .* same family"):
        AuxiliaryPromptNode.execute(clip, "embedding:other dog on grass", "embedding:other dog")
    with pytest.raises(ValueError, match=r"no embedding 'none' in the embeddings folder"):
        AuxiliaryPromptNode.execute(clip, "embedding:none dog on grass", "embedding:none dog")


def test_a_cancel_ends_it(host_folders: Path) -> None:
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        trained(3)


def test_a_file_that_the_host_would_take_in_its_place(host_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host takes the first LoRA of a name, and of embeddings, subfolders and all, whichever it comes upon."""
    loras = host_folders / "loras"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(loras)], {".safetensors"}))
    ConceptFiles("my_dog")
    for path in (
        loras / "my_dog.safetensors",
        host_folders / "embeddings" / "pets" / "my_dog.pt",
        host_folders / "embeddings" / "my_dog",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with pytest.raises(ValueError, match=f"There is another file {re.escape(str(path))}, which ComfyUI would take"):
            ConceptFiles("my_dog")
        path.unlink()
    # Beside the concept's own words this is never read.
    (host_folders / "embeddings" / "my_dog.bin").touch()
    ConceptFiles("my_dog")


def test_folders_are_tried_before_the_training(host_folders: Path) -> None:
    (host_folders / "output").touch()
    with pytest.raises(ValueError, match=r"The concept cannot be saved in .*; make that folder writable"):
        made(small_model(), matching_clip())
