"""Phrases that no tokenizer could find, and nouns, are refused when a workflow is queued, before anything loads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from host import Server
from hosting.errors import WorkflowError
from subject_patches.nodes.auxiliary_prompt import AuxiliaryPromptNode
from subject_patches.nodes.encode_prompt import EncodePromptWithSubjects
from subject_patches.nodes.train_concept import TrainConceptNode
from subject_patches.nodes.train_residual import TrainResidualToken
from subject_patches.nodes.written import check_written
from subject_patches.patches.parts.prompt import find_spans
from subject_patches.tests.shared.clips import clip_of

Workflow = dict[str, dict[str, Any]]

WRONG = {
    "absent": ("a red dog", "cat", "The phrase 'cat' is not in the prompt 'a red dog'; write the phrase as it stands"),
    "one of several": ("a red dog", "red dog; cat\ndog", "The phrase 'cat' is not in"),
    "in a longer word only": ("two dogs", "dog", "The phrase 'dog' is not in"),
    "words in another order": ("a dog that is red", "red dog", "The phrase 'red dog' is not in"),
    "another sign between": ("a red-haired girl", "red haired girl", "is not in the prompt"),
    "an empty prompt": (" ", "dog", "is not in the prompt ''"),
    "one too many": ("a dog, a (dog:1.2)", "dog#3", "asks for occurrence 3 of 'dog', which the prompt has 2 times;"),
    "one of none": ("a dog", "cat#2", "The phrase 'cat' is not in the prompt"),
    "after an embedding": ("embedding:cat on grass", "cat on dog", "'cat on dog' is not in the prompt"),
}


@pytest.mark.parametrize(("text", "phrases", "message"), WRONG.values(), ids=WRONG)
def test_what_no_tokenizer_finds(text: str, phrases: str, message: str) -> None:
    refused = EncodePromptWithSubjects.validate_inputs(text=text, phrases=phrases)
    assert isinstance(refused, str)
    assert message in refused


RIGHT = {
    "nothing": ("", ""),
    "letter case and lines": ("a RED\n dog", "Red Dog"),
    "weights": ("a (very (red:1.3)) dog", "very red dog; (red:1.1) dog"),
    "a weight where none are read": ("a (red:1.3) dog", "(red:1.3) dog"),
    "escaped": (r"a \(red\) dog", r"\(red\); \(red\) dog"),
    "signs": ("a dog,red", "dog , red; dog"),
    "numbers in a word": ("dog2 and 12", "dog; 2"),
    "the second": ("dog and dog", "dog#2"),
    "a number sign of its own": ("dog#2 and dog", "dog#2"),
    "a missing embedding between": ("a red embedding:none dog", "red dog"),
    "an embedding": ("a dog", "embedding:cat"),
    "letters that a tokenizer may compose": ("a \uff44\uff4f\uff47", "dog"),
    "letters by name": ("a d&#111;g", "dog"),
}


@pytest.mark.parametrize(("text", "phrases"), RIGHT.values(), ids=RIGHT)
def test_what_some_tokenizer_may_find(text: str, phrases: str) -> None:
    check_written(text, phrases)


# What tokenizers cut in unlike ways.
PARTS = (
    "dog", "dogs", "red", "a", "o'sole", "it's", "12", "2", "dog2", "(red:1.3)", "((very) red)", r"\(red\)", "dog#2",
    "#2", "_dog", ",", "!", "{", "(do)g", "embedding:none", "DOG", "\n", "'ma", "<s>", ":1.2)", "(", "'re",
)  # fmt: skip


def test_nothing_is_refused_that_a_tokenizer_finds() -> None:
    """Over texts of such parts, and phrases cut out of them anywhere, by CLIP's, T5's, Llama's and Qwen's tokens."""
    clips = [clip_of(family) for family in ("HiDream", "Qwen-Image")]
    source = np.random.default_rng(3)
    found = 0
    for _ in range(150):
        text = "".join(str(source.choice(PARTS)) + " " * int(source.integers(3)) for _ in range(source.integers(1, 7)))
        start = int(source.integers(len(text)))
        phrase = text[start : start + int(source.integers(1, 9))].strip()
        for clip in clips:
            try:
                count = len(find_spans(clip, text, [phrase]))
            except ValueError:
                continue
            found += count
            check_written(text, phrase)
    assert found > 50


def test_a_concept_that_is_not_in_its_prompt() -> None:
    def refused(text: Any, concept: Any, noun: Any = "", phrases: Any = "") -> Any:
        return AuxiliaryPromptNode.validate_inputs(text=text, concept=concept, noun=noun, phrases=phrases)

    assert "'V* dog' is not in the prompt 'a red dog'" in refused("a red dog", "V* dog")
    assert "'dog' is already in the prompt" in refused("a V* cat and a dog", "V* cat", "dog")
    assert "The phrase 'lawn' is not in" in refused("a V* dog on grass", "V* dog", phrases="grass; lawn")
    assert refused("a embedding:my dog", "embedding:my dog", phrases="a") is True
    assert refused(None, "V* dog") is refused("a dog", None) is refused("a dog", "cat", None, None) is True


def test_nouns_that_cannot_be_trained() -> None:
    for node in (TrainConceptNode, TrainResidualToken):
        assert "The noun is empty; write what the subject is" in node.validate_inputs(noun=[" "])
        assert "write words alone" in node.validate_inputs(noun=["(dog:1.2)"])
        assert node.validate_inputs(noun=["dog"]) is node.validate_inputs(noun=(None,)) is True


def workflow_of(inputs: dict[str, Any], others: Workflow) -> Workflow:
    kinds = {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": "subject-patches-toy.safetensors"}),
        "2": ("SubjectPatchesEncodePrompt", {"clip": ["1", 1], **inputs}),
        "3": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "4": (
            "KSampler",
            {"model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0], "seed": 0,
             "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0},
        ),
        "5": ("SaveLatent", {"samples": ["4", 0], "filename_prefix": "written"}),
    }  # fmt: skip
    return {number: {"class_type": kind, "inputs": given} for number, (kind, given) in kinds.items()} | others


def test_over_the_queue(server: Server) -> None:
    """The host refuses the workflow, so nothing of it runs; a text that comes by a link waits for the node itself."""
    text = "two dogs on grass"
    wrong = workflow_of({"text": text, "phrases": "dog"}, {})
    refused = r"The phrase 'dog' is not in the prompt 'two dogs on grass'"
    with pytest.raises(WorkflowError, match=rf"^The host refused SubjectPatchesEncodePrompt \(node 2\): .*{refused}"):
        server.queue(wrong)
    node = {"class_type": "PrimitiveString", "inputs": {"value": text}}
    linked = workflow_of({"text": ["6", 0], "phrases": "dog"}, {"6": node})
    with pytest.raises(WorkflowError, match=r"\(node 2\) failed: The phrase 'dog' is not in the prompt; its tokens"):
        server.queue(linked)
    server.queue(workflow_of({"text": text, "phrases": "dogs"}, {}))
