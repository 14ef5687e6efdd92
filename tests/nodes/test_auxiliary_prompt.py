"""The auxiliary prompt: its text, and the node with a small CLIP of random weights that really encodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import comfy.supported_models
import pytest
import torch
from comfy.supported_models_base import ClipTarget
from hosting.random_models import SMALL, model_of
from safetensors.torch import save_file
from subject_patches.nodes.auxiliary_prompt import AuxiliaryPromptNode
from subject_patches.nodes.dual_branch import DualBranchIntegrationNode
from subject_patches.patches.mechanisms.auxiliary_prompt import PRESETS, auxiliary_text, preset_noun
from subject_patches.patches.mechanisms.dual_branch import BRANCH_KEY, BranchWindow, DualBranchIntegration
from subject_patches.patches.parts.prompt import SPANS_KEY, positions_of
from subject_patches.toy.family import WIDTH, ToyClip, ToyTokenizer


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> comfy.sd.CLIP:
    folder: Path = tmp_path_factory.mktemp("embeddings")
    generator = torch.Generator().manual_seed(5)
    save_file({"emb_params": torch.randn(3, WIDTH, generator=generator)}, folder / "mine.safetensors")
    made = comfy.sd.CLIP(ClipTarget(ToyTokenizer, ToyClip), embedding_directory=str(folder))
    with torch.no_grad():
        for name, weight in made.cond_stage_model.named_parameters():
            weight.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.2, generator=generator)
    return made


def made(clip: Any, text: str, concept: str, **values: Any) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The dictionaries of both conditionings, and the auxiliary text."""
    concept, auxiliary, text = AuxiliaryPromptNode.execute(clip, text, concept, **values).args
    return concept[0][1], auxiliary[0][1], text


@pytest.mark.parametrize(
    ("text", "concept", "right"),
    [
        ("a V* backpack in Times Square", "V* backpack", "a cat in Times Square"),
        ("a v* Backpack, the V* BACKPACK!", "V* backpack", "a cat, the cat!"),
        ("(sks dog:1.2) by a lake", "sks dog", "(cat:1.2) by a lake"),
        ("a sks (dog:1.2) by a lake", "sks (dog:1.2)", "a cat by a lake"),
        ("embedding:my-toy plushy on a roof", "embedding:my-toy plushy", "cat on a roof"),
        ("a dog and a hotdog, a dog-house, dogs", "dog", "a cat and a hotdog, a dog-house, dogs"),
        ("a dog.", "dog", "a cat."),
        ("a sks\n dog  on grass", " sks  dog\n", "a cat  on grass"),
    ],
)
def test_the_noun_takes_the_place_of_the_whole_phrase(text: str, concept: str, right: str) -> None:
    assert auxiliary_text(text, concept, "cat") == right


def test_a_noun_without_letters(clip: comfy.sd.CLIP) -> None:
    """An emoji is a word to the model."""
    concept, auxiliary, text = made(clip, "a sks dog on grass", "sks dog", noun="🐱")
    assert text == "a 🐱 on grass"
    assert auxiliary[BRANCH_KEY].noun[0][0] == concept[BRANCH_KEY].noun[0][0]
    with pytest.raises(ValueError, match="The auxiliary noun '🐱' is already in the prompt; choose one that is not"):
        auxiliary_text("a sks dog beside a 🐱", "sks dog", "🐱")
    with pytest.raises(ValueError, match="The auxiliary noun '🐱' is part of the concept phrase 'sks 🐱'; choose one"):
        auxiliary_text("a sks 🐱 on grass", "sks 🐱", "🐱")
    with pytest.raises(ValueError, match=r"The auxiliary noun '\?!' is no word; write a common noun"):
        auxiliary_text("a sks dog on grass", "sks dog", "?!")


def test_the_conditionings_know_which_is_which(clip: comfy.sd.CLIP) -> None:
    prompts = AuxiliaryPromptNode.execute(clip, "a sks dog on grass", "sks dog", noun="red cat").args[:2]
    concept, auxiliary = (each[0][1][BRANCH_KEY] for each in prompts)
    # By their tokens they are alike.
    assert (concept.prompt, concept.noun) == (auxiliary.prompt, auxiliary.noun)
    assert concept != auxiliary
    model = model_of(comfy.supported_models.SD15, {**SMALL, "context_dim": WIDTH})
    for given, message in (
        (prompts[::-1], "The concept input has the auxiliary conditioning; connect the concept output"),
        ((prompts[0], prompts[0]), "The auxiliary input has the concept conditioning; connect the auxiliary output"),
    ):
        with pytest.raises(ValueError, match=message):
            DualBranchIntegrationNode.execute(model, *given, 1.0, 1.0, 0.5)
    edit = DualBranchIntegration(frozenset(), BranchWindow(), concept, auxiliary, None)
    with pytest.raises(ValueError, match="The sampler's positive prompt is the auxiliary conditioning of Dual-Branch"):
        edit.check([prompts[1][0][1]])


def test_presets_differ_from_what_is_in_the_prompt() -> None:
    assert preset_noun("a V* backpack on a chair") == PRESETS[0]
    assert preset_noun("a V* cat beside two Dogs") not in ("cat", "dog")
    with pytest.raises(ValueError, match="every preset noun in it; write an auxiliary noun of your own"):
        preset_noun(" ".join(PRESETS))


@pytest.mark.parametrize(
    ("text", "concept", "noun", "message"),
    [
        ("a red dog", "V* dog", "cat", r"'V\* dog' is not in the prompt 'a red dog'; write it as it stands"),
        ("a red dog", "", "cat", "The concept phrase is empty; write"),
        ("a V* dog", "V* dog", "Dog", r"noun 'Dog' is part of the concept phrase 'V\* dog'; choose one that differs"),
        ("a V* dog", "V* dog", "big dog", "is part of the concept phrase"),
        ("a V* dog", "V* dog", " ", "The auxiliary noun is empty; write"),
        ("\n".join(["red"] * 90), "V*\ndog", "cat", f"'V[*] dog' is not in the prompt '{' '.join(['red'] * 40)} …'; w"),
        ("a V* dog and a cat", "V* dog", "cat", "noun 'cat' is already in the prompt; choose one that is not"),
    ],
)
def test_what_it_refuses(text: str, concept: str, noun: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auxiliary_text(text, concept, noun)


def test_both_prompts_know_their_tokens(clip: comfy.sd.CLIP) -> None:
    concept, auxiliary, text = made(clip, "a red dog on grass", "red dog", noun="big cat", phrases="grass")
    assert text == "a big cat on grass"
    assert positions_of(concept[BRANCH_KEY].prompt) == [1, 2, 3, 4, 5]
    assert positions_of(concept[BRANCH_KEY].noun) == [2, 3]
    assert concept[SPANS_KEY] == {"red dog": ((2, 4),), "grass": ((5, 6),)}
    assert positions_of(auxiliary[BRANCH_KEY].prompt) == [1, 2, 3, 4, 5]
    assert positions_of(auxiliary[BRANCH_KEY].noun) == [2, 3]
    # What stands for a phrase goes by the phrase's own name, so that a layout finds it in both prompts.
    assert auxiliary[SPANS_KEY] == {"red dog": ((2, 4),), "grass": ((5, 6),)}


def test_phrases_that_share_words_with_the_concept(clip: comfy.sd.CLIP) -> None:
    phrases = "dog\nred dog on\ndog on grass"
    concept, auxiliary, _ = made(clip, "a red dog on grass", "red dog", noun="big cat", phrases=phrases)
    assert concept[SPANS_KEY]["dog on grass"] == ((3, 6),)
    assert auxiliary[SPANS_KEY] == {"red dog": ((2, 4),), "dog": ((2, 4),), "red dog on": ((2, 5),)}


def test_embeddings_weights_and_repeats(clip: comfy.sd.CLIP) -> None:
    text = "(embedding:mine dog:1.3) on grass, embedding:mine dog"
    concept, auxiliary, other = made(clip, text, "embedding:mine dog", preset="chair")
    assert other == "(chair:1.3) on grass, chair"
    noun = positions_of(concept[BRANCH_KEY].noun)
    assert noun[:4] == [1, 2, 3, 4]
    assert len(noun) == 8
    assert len(positions_of(concept[BRANCH_KEY].prompt)) - len(positions_of(auxiliary[BRANCH_KEY].prompt)) == 6


def test_more_than_77_tokens(clip: comfy.sd.CLIP) -> None:
    concept, auxiliary, _ = made(clip, "so " * 80 + "red dog on grass", "red dog")
    prompt = positions_of(concept[BRANCH_KEY].prompt)
    # Neither chunk's start and end count.
    assert prompt == [*range(1, 76), *range(78, 87)]
    assert positions_of(concept[BRANCH_KEY].noun) == [83, 84]
    assert positions_of(auxiliary[BRANCH_KEY].noun) == [83]


def test_the_concepts_conditioning_is_the_hosts(clip: comfy.sd.CLIP) -> None:
    text = "a (red dog:1.2) on grass"
    concept, auxiliary, other = AuxiliaryPromptNode.execute(clip, text, "red dog").args
    for found, each in ((concept, text), (auxiliary, other)):
        assert torch.equal(found[0][0], clip.encode_from_tokens_scheduled(clip.tokenize(each))[0][0])


def test_what_the_node_refuses(clip: comfy.sd.CLIP) -> None:
    with pytest.raises(ValueError, match="The clip input is None"):
        AuxiliaryPromptNode.execute(None, "a dog", "dog")
    with pytest.raises(ValueError, match="The preset is 'tree'; choose one of automatic, cat"):
        AuxiliaryPromptNode.execute(clip, "a dog", "dog", preset="tree")
    with pytest.raises(ValueError, match="'dog' is not in the prompt"):
        AuxiliaryPromptNode.execute(clip, "a cat", "dog")
    with pytest.raises(ValueError, match="'embedding:nothing' has no tokens"):
        AuxiliaryPromptNode.execute(clip, "a dog", "dog", noun="embedding:nothing")
