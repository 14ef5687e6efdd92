"""Inputs of one name: one type and one tooltip over all nodes, or a reason why not; and one order."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

from subject_patches.tests.shared.schemas import SCHEMAS

# Reasons why an input of a node is not what others of its name are, and the inputs by node.
REASONS = {
    "it says which families of models the node takes": {
        "AnyStory.model", "SemanticInjection.model", "TrainConcept.model", "TrainResidualToken.model",
    },
    "it says which of two models, prompts or texts it is": {
        "StepBlendedGuider.model", "InvertToTrajectory.clip", "LoadResidualToken.clip", "TrainConcept.clip",
        "TrainResidualToken.clip", "InvertToTrajectory.conditioning", "ApplyResidualTokens.conditioning",
        "MultiSourceSwap.reference_conditioning",
    },
    "what has a strength is no reference": {
        "ApplyResidualTokens.strength", "DualBranchIntegration.strength", "SemanticInjection.strength",
    },
    "the node's own layers are usual, and it says which": {
        "LayoutBias.sites", "RecycledSelfAttention.sites", "RoutedReferenceAttention.sites", "MultiSourceSwap.sites",
        "DualBranchIntegration.sites",
    },
    "the window is the paper's T_a, which begins with the run": {"DualBranchIntegration.end_percent"},
    "the papers differ in which passes take part, and in what that costs": {
        "RecycledSelfAttention.apply_to", "MultiSourceSwap.apply_to",
    },
    "the papers differ in what they take": {
        "TrainConcept.steps", "TrainResidualToken.steps", "TrainConcept.learning_rate",
        "TrainResidualToken.learning_rate",
    },
    "a picture, mask or crop is of what the node makes of it": {
        "Subject.image", "AnyStorySubject.image", "AttentionInspector.image", "Subject.mask", "AnyStorySubject.mask",
        "Layout.mask", "AdaptiveBlendMask.mask", "EncodeImagePrompt.crop", "AnyStorySubject.crop", "Subject.size",
        "AnyStorySubject.size", "EncodeImagePrompt.clip_vision", "AnyStorySubject.clip_vision",
        "EncodeSubjects.clip_vision", "SemanticInjection.clip_vision",
        "AlignReference.image", "AlignReference.mask", "InvertToTrajectory.mask", "Subject.margin",
        "AlignReference.margin", "Subject.background", "AlignReference.background", "EncodeImagePrompt.background",
        "SemanticInjection.background",
    },
    "phrases are looked for in another place than the node's own text": {
        "RecordAttention.phrases", "Layout.phrases", "Subject.phrase", "ApplyResidualTokens.phrase",
        "AdaptiveBlendMask.phrase",
    },
    "a link of another type has the name of what it brings": {
        "AnyStorySubject.others", "Layout.others", "LayoutBias.layout", "RouteByMasks.layout", "MultiSourceSwap.layout",
        "EncodePrompt.subjects",
        "RoutedReferenceAttention.subjects", "AnyStory.subjects", "AttentionInspector.subjects", "AnyStory.router",
        "RoutedReferenceAttention.router", "AuxiliaryPrompt.concept", "DualBranchIntegration.concept",
        "RouteByEncoder.encoder",
    },
    "a file or folder of its own kind": {
        "LoadResidualToken.file", "LoadImagePromptAdapter.file", "LoadAnyStory.file", "LoadTrajectory.file",
        "LoadSemanticInjection.file", "LoadSubjectEncoder.file",
        "SaveResidualToken.filename_prefix", "SaveTrajectory.filename_prefix",
    },
    "a word that papers use for unlike things": {
        "LayoutBias.eta", "RouteByAttention.threshold", "RouteByEncoder.maps", "AdaptiveBlendMask.threshold",
        "AuxiliaryPrompt.noun", "AuxiliaryPrompt.preset", "TrainConcept.preset",
    },
}  # fmt: skip
# In which order inputs stand that several nodes have. Where reordering would shift what saved workflows hold by place,
# the node is named with its input.
ORDER = (
    "model", "clip", "vae", "images", "noun", "subject", "strength", "sites", "start_percent", "end_percent", "seed",
    "named_sites", "noise_level", "positions", "cache_megabytes",
)  # fmt: skip
PLACED = {"RoutedReferenceAttention.noise_level", "DualBranchIntegration.sites", "Subject.vae", "AnyStorySubject.vae"}
LONGEST = 300


def _called(schema: Any, each: Any) -> str:
    return f"{schema.node_id.removeprefix('SubjectPatches')}.{each.id}"


def _meanings() -> dict[str, dict[str, tuple[str, str]]]:
    """By their names, the inputs of each node: type and tooltip."""
    found: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    for schema in SCHEMAS:
        for each in schema.inputs:
            found[each.id][_called(schema, each)] = (each.get_io_type(), each.tooltip)
    return found


def test_one_name_one_meaning() -> None:
    excused = set(itertools.chain(*REASONS.values()))
    meant = _meanings()
    left = [{name: each[name] for name in each.keys() - excused} for each in meant.values()]
    assert [inputs for inputs in left if len(set(inputs.values())) > 1] == []
    assert excused <= {name for inputs in meant.values() for name in inputs}


def test_no_reason_outlives_its_need() -> None:
    """An excused input does differ from another of its name, and stands under one reason."""
    excused = list(itertools.chain(*REASONS.values()))
    assert len(excused) == len(set(excused))
    for inputs in _meanings().values():
        for name in inputs.keys() & set(excused):
            assert any(meaning != inputs[name] for meaning in inputs.values()), name


def test_one_order() -> None:
    for schema in SCHEMAS:
        shared = [each.id for each in schema.inputs if each.id in ORDER and _called(schema, each) not in PLACED]
        assert shared == sorted(shared, key=ORDER.index), schema.node_id


def test_tooltips_are_short() -> None:
    """What is longer is for the help page."""
    parts = [(schema.node_id, each) for schema in SCHEMAS for each in (*schema.inputs, *schema.outputs)]
    assert [(node, each.id) for node, each in parts if len(each.tooltip) > LONGEST] == []
