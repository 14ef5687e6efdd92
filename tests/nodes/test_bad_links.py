"""What another pack may put on a link: pictures, masks, latents and prompts that no node of the host would make.

Every input of these types is in the table; each bad value ends at node time in one sentence, which names the input."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from subject_patches.nodes.align import AlignReferenceNode
from subject_patches.nodes.anystory_subject import AnyStorySubjectNode
from subject_patches.nodes.attention_inspector import AttentionInspectorNode
from subject_patches.nodes.checks import masks_in, pictures_in, upside_down
from subject_patches.nodes.dual_branch import DualBranchIntegrationNode
from subject_patches.nodes.layout import LayoutNode
from subject_patches.nodes.recycled_attention import RecycledSelfAttentionNode
from subject_patches.nodes.residual import ApplyResidualTokens
from subject_patches.nodes.retouch import AdaptiveBlendMaskNode, MultiSourceSwapNode
from subject_patches.nodes.routed_reference import RoutedReferenceAttentionNode, SubjectShareNode
from subject_patches.nodes.router import RouteByMasksNode
from subject_patches.nodes.semantic_injection import SemanticInjectionNode
from subject_patches.nodes.step_blended_guider import StepBlendedGuiderNode
from subject_patches.nodes.subject import SubjectNode
from subject_patches.nodes.train_concept import TrainConceptNode
from subject_patches.nodes.train_residual import TrainResidualToken
from subject_patches.nodes.trajectory import InvertToTrajectoryNode
from subject_patches.patches.mechanisms.residual import ResidualToken
from subject_patches.patches.pictures.attention_record import AttentionRuns
from subject_patches.tests.shared.clips import small_clip
from subject_patches.tests.shared.models import (
    CONTEXT,
    auxiliary_prompt,
    known_prompt,
    levels,
    prompt,
    randn,
    recycled,
    routed,
    small_model,
    subject,
    trajectory,
)
from subject_patches.tests.shared.schemas import NODES
from subject_patches.tests.shared.semantics import told

NAN, INF = math.nan, math.inf
MODEL = small_model()
PICTURES = torch.rand(2, 32, 48, 3)
MASKS = torch.ones(1, 8, 8)
LATENT = {"samples": randn(1, 4, 8, 8)}


def filled(like: torch.Tensor, value: float) -> torch.Tensor:
    """A copy with one value in its last picture changed."""
    changed = like.clone()
    changed[-1].flatten()[5] = value
    return changed


def subject_of(**values: Any) -> Any:
    given = {"image": PICTURES, "vae": object(), "phrase": "", "size": 64, "margin": 0.1, **values}
    return SubjectNode.execute(**{name: [value] for name, value in given.items()})


def inspected(image: Any) -> Any:
    return AttentionInspectorNode.execute(AttentionRuns(), image)


def inverted(latent: Any = LATENT, **values: Any) -> Any:
    return InvertToTrajectoryNode.execute(MODEL, latent, levels(MODEL, 2), **{"conditioning": prompt(1), **values})


def swapped(**values: Any) -> Any:
    return MultiSourceSwapNode.execute(MODEL, trajectory(randn(1, 4, 8, 8)), **values)


def integrated(concept: Any = None, auxiliary: Any = None) -> Any:
    prompts = concept or known_prompt() if concept != [] else [], auxiliary or auxiliary_prompt()
    return DualBranchIntegrationNode.execute(MODEL, *prompts, 1.0, 1.0, 0.5)


def guided(**values: Any) -> Any:
    given = {"positive": prompt(1), "personalised_positive": prompt(2), "negative": prompt(3), **values}
    return StepBlendedGuiderNode.execute(
        MODEL, given["positive"], MODEL, given["personalised_positive"], given["negative"], 1, 3.0, 3.0
    )


TOLD = {"noun": "dog", "steps": 1}
TRAININGS: dict[type, Callable[[list[Any]], Any]] = {
    TrainConceptNode: lambda images, **more: TrainConceptNode.trained(
        images,
        MODEL,
        small_clip("SD 1.x", 0, hidden_size=CONTEXT),
        object(),
        name="bad",
        preset="plain",
        **TOLD,
        **more,
    ),
    TrainResidualToken: lambda images: TrainResidualToken.trained(
        images, MODEL, small_clip("SD 1.x", 0, hidden_size=CONTEXT), object(), **TOLD
    ),
}

# How a node is given a value on one of its links, everything else being good.
LINKS: dict[tuple[type, str], Callable[[Any], Any]] = {
    (SubjectNode, "image"): lambda value: subject_of(image=value),
    (AttentionInspectorNode, "image"): inspected,
    (AnyStorySubjectNode, "image"): lambda value: AnyStorySubjectNode.execute(None, value, object(), None, None, MASKS),
    (AnyStorySubjectNode, "mask"): lambda value: AnyStorySubjectNode.execute(
        None, PICTURES[:1], object(), None, None, value
    ),
    (TrainConceptNode, "images"): lambda value: TRAININGS[TrainConceptNode]([PICTURES, value]),
    (TrainConceptNode, "regularisation_images"): lambda value: TRAININGS[TrainConceptNode](
        [PICTURES], regularisation_images=[value]
    ),
    (TrainResidualToken, "images"): lambda value: TRAININGS[TrainResidualToken]([PICTURES, value]),
    (SubjectNode, "mask"): lambda value: subject_of(mask=value),
    (LayoutNode, "mask"): lambda value: LayoutNode.execute(64, 64, "a\nb", mask=value),
    (RouteByMasksNode, "masks"): RouteByMasksNode.execute,
    (RecycledSelfAttentionNode, "region_mask"): lambda value: recycled(MODEL, region_mask=value),
    (MultiSourceSwapNode, "blend_mask"): lambda value: swapped(blend_mask=value),
    (AdaptiveBlendMaskNode, "mask"): lambda value: AdaptiveBlendMaskNode.execute(value),
    (InvertToTrajectoryNode, "latent"): inverted,
    (InvertToTrajectoryNode, "mask"): lambda value: inverted(mask=value),
    (AlignReferenceNode, "image"): lambda value: AlignReferenceNode.execute(value, MASKS),
    (AlignReferenceNode, "mask"): lambda value: AlignReferenceNode.execute(PICTURES, value),
    (AlignReferenceNode, "layout_mask"): lambda value: AlignReferenceNode.execute(PICTURES, MASKS, value),
    (InvertToTrajectoryNode, "conditioning"): lambda value: inverted(conditioning=value),
    (RecycledSelfAttentionNode, "reference_conditioning"): lambda value: recycled(MODEL, reference_conditioning=value),
    (MultiSourceSwapNode, "layout_conditioning"): lambda value: swapped(layout_conditioning=value),
    (MultiSourceSwapNode, "reference_conditioning"): lambda value: swapped(reference_conditioning=value),
    (RoutedReferenceAttentionNode, "reference_conditioning"): lambda value: routed(
        MODEL, (subject(),), reference_conditioning=value
    ),
    (RoutedReferenceAttentionNode, "background_prompt"): lambda value: routed(
        MODEL, (subject(),), background_prompt=value
    ),
    (SubjectShareNode, "image_prompt"): lambda value: SubjectShareNode.execute((subject(),), image_prompt=value),
    (SemanticInjectionNode, "background"): lambda value: told(MODEL, (subject(),), background=value),
    (DualBranchIntegrationNode, "concept"): lambda value: integrated(value),
    (DualBranchIntegrationNode, "auxiliary"): lambda value: integrated(None, value),
    (ApplyResidualTokens, "conditioning"): lambda value: ApplyResidualTokens.execute(
        value, ResidualToken(torch.zeros(1, CONTEXT), "subject", 1)
    ),
    (StepBlendedGuiderNode, "positive"): lambda value: guided(positive=value),
    (StepBlendedGuiderNode, "personalised_positive"): lambda value: guided(personalised_positive=value),
    (StepBlendedGuiderNode, "negative"): lambda value: guided(negative=value),
}
BAD: dict[str, dict[str, Any]] = {
    "IMAGE": {
        "NaN": filled(PICTURES, NAN),
        "infinite": filled(PICTURES, -INF),
        "0 to 255": filled(PICTURES * 255, 255.0),
        "negative": PICTURES - 2,
        "bytes": (PICTURES * 255).byte(),
        "5 channels": torch.rand(1, 8, 8, 5),
        "no channel": torch.rand(1, 8, 8, 0),
        "2 axes": torch.rand(8, 3),
        "5 axes": torch.rand(1, 1, 8, 8, 3),
        "no picture": torch.rand(0, 8, 8, 3),
        "no area": torch.rand(1, 0, 8, 3),
        "a latent": LATENT,
        "nothing": None,
    },
    "MASK": {
        "NaN": filled(MASKS, NAN),
        "infinite": filled(MASKS, INF),
        "5": filled(MASKS, 5.0),
        "negative": MASKS - 3,
        "1 axis": torch.ones(8),
        "a number": torch.tensor(1.0),
        "pictures": torch.ones(1, 8, 8, 3),
        "no mask": torch.ones(0, 8, 8),
        "no area": torch.ones(1, 8, 0),
    },
    "LATENT": {
        "NaN": {"samples": filled(LATENT["samples"], NAN)},
        "infinite": {"samples": filled(LATENT["samples"], INF)},
        "16 channels": {"samples": randn(1, 16, 8, 8)},
        "a video": {"samples": randn(1, 4, 3, 8, 8)},
        "no picture": {"samples": randn(0, 4, 8, 8)},
        "no area": {"samples": randn(1, 4, 0, 8)},
        "no samples": {},
        "a tensor": LATENT["samples"],
    },
    "CONDITIONING": {
        "empty": [],
        "NaN": [[filled(prompt(1)[0][0], NAN), {}]],
        "another width": prompt(1, width=2 * CONTEXT),
    },
}
# Without an auxiliary prompt there is nothing to integrate, and without a background there is none to tell of. Subject
# Share knows no model, and of residual tokens the sentence is about the token.
IDLE = {
    (DualBranchIntegrationNode, "auxiliary", "empty"),
    (SemanticInjectionNode, "background", "nothing"),
    (SubjectShareNode, "image_prompt", "another width"),
    (ApplyResidualTokens, "conditioning", "another width"),
}
SENTENCE = r"^[^;]*[;.] [^;]+\.$"


def _kinds(node: type) -> dict[str, str]:
    """The inputs of a node that take one of the types of BAD, by their names."""
    found = {}
    for each in node.GET_SCHEMA().inputs:
        types = {kind for kind in BAD if kind in each.get_io_type().split(",")}
        if types:
            (found[each.id],) = types
    return found


def _cases() -> list[Any]:
    return [
        pytest.param(node, name, bad, id=f"{node.__name__}-{name}-{bad}")
        for node, name in LINKS
        for bad in BAD[_kinds(node)[name]]
        if (node, name, bad) not in IDLE
    ]


def test_the_table_has_every_link() -> None:
    assert {(node, name) for node in NODES.values() for name in _kinds(node)} == set(LINKS)


@pytest.mark.parametrize(("node", "name", "bad"), _cases())
def test_a_bad_value_ends_in_a_sentence(node: type, name: str, bad: str) -> None:
    value = BAD[_kinds(node)[name]][bad]
    with pytest.raises(ValueError, match=SENTENCE) as refused:
        LINKS[node, name](value)
    assert re.search(rf"(?<!\w){name}", str(refused.value).replace(" prompt", "_prompt"))


# What is brought into the host's form


def test_pictures_of_few_channels_become_colours() -> None:
    grey = PICTURES[..., :1]
    assert torch.equal(pictures_in("image", grey), grey.expand(-1, -1, -1, 3))
    with_opacity = pictures_in("image", PICTURES[..., :2])
    assert torch.equal(with_opacity[..., :3], grey.expand(-1, -1, -1, 3))
    assert torch.equal(with_opacity[..., 3], PICTURES[..., 1])
    assert torch.equal(pictures_in("image", PICTURES[0]), PICTURES[:1])
    assert pictures_in("image", PICTURES) is PICTURES
    # What resizing overshoots is cut off.
    assert torch.equal(pictures_in("image", PICTURES * 1.4 - 0.2), (PICTURES * 1.4 - 0.2).clamp(0, 1))


def test_masks_of_other_shapes_are_masks() -> None:
    masks = torch.rand(2, 6, 5)
    for other in (masks[:, None], masks[..., None]):
        assert torch.equal(masks_in("mask", other), masks)
    assert torch.equal(masks_in("mask", masks[0]), masks[:1])
    assert torch.equal(masks_in("mask", masks > 0.5), (masks > 0.5).float())


def test_an_upside_down_mask_is_told(caplog: pytest.LogCaptureFixture) -> None:
    mask = torch.ones(32, 48)
    assert "covers 100%" in upside_down("mask", mask)
    mask[8:24, 10:30] = 0
    assert "covers 79% of its picture, its edge included" in upside_down("subject's mask", mask)
    assert upside_down("mask", 1 - mask) is None
    # A subject that reaches one edge.
    assert upside_down("mask", (torch.arange(48) > 20).expand(32, 48).float()) is None
    with caplog.at_level(logging.WARNING):
        AdaptiveBlendMaskNode.execute(mask)
        RouteByMasksNode.execute(mask)
    assert "The mask 1 of 1 covers 79%" in caplog.text
    assert "The mask 1 covers 79%" in caplog.text


def test_a_list_where_one_value_belongs_is_refused() -> None:
    """A list of pictures is one thing; of anything else these nodes take one."""
    with pytest.raises(ValueError, match="The size comes as a list of 2, but this node makes one thing of all its"):
        SubjectNode.execute([PICTURES], vae=[object()], size=[64, 96])
    for node in (TrainConceptNode, TrainResidualToken):
        with pytest.raises(ValueError, match="The noun comes as a list of 2, but this node makes one thing of all its"):
            node.execute([PICTURES], noun=["dog", "cat"], steps=[1])


@pytest.mark.parametrize("node", [TrainConceptNode, TrainResidualToken])
def test_no_training_pictures(node: type) -> None:
    with pytest.raises(ValueError, match="There are no training pictures; give 3 to 5 of the subject"):
        TRAININGS[node]([])
