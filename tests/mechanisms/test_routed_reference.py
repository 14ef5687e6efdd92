"""Routed reference attention: AnyStory's equations by themselves, and what its nodes refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comfy.ldm.modules import attention as host
from subject_patches.nodes.routed_reference import SubjectShareNode
from subject_patches.patches.engine.call import AttentionCall
from subject_patches.patches.engine.chunk import Chunk
from subject_patches.patches.engine.execution import execute
from subject_patches.patches.mechanisms.image_prompt import TokenPrompt
from subject_patches.patches.mechanisms.routed_reference import inject, routed_reference_attention
from subject_patches.patches.mechanisms.router import one_hot
from subject_patches.patches.parts.sites import Site
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared import dense
from subject_patches.tests.shared.models import (
    CONTEXT,
    generator,
    map_router,
    prompt,
    routed,
    subject,
)
from torch import Tensor

TOLERANCE = 1e-5
CHUNK = Chunk(slice(0, 1), "positive", True, {}, (8, 8))


# Exactness: grouped by route as against the dense, masked softmax


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return host.attention_pytorch(query, key, value, 3, mask)


def routes(kind: str, rows: int, queries: int, count: int) -> Tensor:
    if kind == "random":
        return torch.randint(count + 1, (rows, queries))
    if kind == "one for all rows":
        return torch.randint(count + 1, (1, queries))
    if kind == "empty groups":
        return torch.randint(2, (rows, queries)) * count
    return torch.full((rows, queries), count)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("kind", ["random", "one for all rows", "empty groups", "all background"])
@pytest.mark.parametrize("gammas", [False, True])
def test_grouped_by_route_is_the_masked_softmax(count: int, kind: str, gammas: bool) -> None:
    torch.manual_seed(count)
    rows, queries, channels = 2, 31, 12
    route = routes(kind, rows, queries, count)
    gamma = torch.randn(count).tolist() if gammas else [0.0] * count
    own = [torch.randn(rows, queries, channels) for _ in range(3)]
    call = AttentionCall(*own, 3, Site("self", "middle", 0, 0), CHUNK, None)
    keys, values = [call.key], [call.value]
    for number in range(count):
        key, value = torch.randn(2, 1, 4 + number, channels)
        bias = torch.tensor(gamma[number]).view(1, 1, 1) if gammas else None
        call.extend(key, value, bias, route == number)
        keys.append(key.expand(rows, -1, -1))
        values.append(value.expand(rows, -1, -1))
    maps = one_hot(route.expand(rows, -1), count)
    right = routed_reference_attention(call.query, keys, values, maps, gamma, 3)
    masks_seen: list[Tensor | None] = []

    def counted(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        masks_seen.append(mask)
        return attend(query, key, value, mask)

    (output,) = execute([call], counted)
    torch.testing.assert_close(output, right, rtol=0, atol=TOLERANCE)
    # What is written as equations is what another hand computes in float64.
    again = dense.attention(call.query, call.key, call.value, 3, None, call.extensions)
    torch.testing.assert_close(right.double(), again, rtol=0, atol=TOLERANCE)
    # A mask over queries is never made: a gamma is a vector over keys.
    assert all(mask is None or mask.shape[1] == 1 for mask in masks_seen)
    assert gammas or set(masks_seen) == {None}


@pytest.mark.parametrize("rows", [1, 3])
def test_equation_5_of_one_subject(rows: int) -> None:
    source = generator(5)
    query, output = torch.randn(2, 3, 11, 12, generator=source)
    key, value = torch.randn(2, 1, 4, 12, generator=source)
    route = torch.randint(3, (rows, 11), generator=source)
    term = dense.attention(query, key.expand(3, -1, -1), value.expand(3, -1, -1), 3)
    before = output.clone()
    for number in (0, 1, 5):
        mine = route == number
        right = output.double() + 0.7 * mine[..., None] * term
        torch.testing.assert_close(
            inject(output, query, key, value, 3, mine, 0.7).double(), right, rtol=0, atol=TOLERANCE
        )
    assert torch.equal(output, before)


# Nodes


def test_a_share_belongs_to_its_subjects() -> None:
    one, other = subject(seed=1), subject(seed=2)
    prompted = [[torch.ones(1, 3, CONTEXT), {}]]
    shared = SubjectShareNode.execute((one, other), 2.0, 0.1, 0.6, prompted, 0.5).args[0]
    for before, after in zip((one, other), shared, strict=True):
        assert after.cache is before.cache
        assert (after.share.strength, after.share.window, after.share.eta) == (2.0, Window(0.1, 0.6), 0.5)
        assert after.share.prompt.tokens.shape == (1, 3, CONTEXT)
        assert before.share.prompt is None


@pytest.mark.parametrize("several", [prompt(1) + prompt(2), [[torch.ones(2, 3, CONTEXT), {}]]])
def test_an_image_prompt_of_several_is_refused(several: Any) -> None:
    """Only the first would act."""
    with pytest.raises(ValueError, match=r"The image prompt has \d prompts of \d rows, of which only one can act; con"):
        SubjectShareNode.execute((subject(),), image_prompt=several)


def test_bad_numbers_of_subjects(model: Any) -> None:
    nine = tuple(subject(seed=number) for number in range(9))
    with pytest.raises(ValueError, match="There are 9 subjects; one node takes 1 to 8"):
        routed(model, nine, map_router())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strength": -0.1}, r"The strength is -0\.1; give a number from 0 to 10\."),
        ({"eta": math.inf}, "The eta is inf; give a number from 0 to 10"),
        ({"noise_level": "low"}, "noise_level is 'low'; choose one of usual, current, fixed, nearly clean"),
        ({"cross_attention": "none"}, "cross_attention is 'none'; choose one of kept, skipped"),
        ({"start_percent": 0.7, "end_percent": 0.3}, "The window starts at 0.7, after its end at 0.3"),
        ({"background_prompt": []}, "The background prompt is an empty conditioning; connect one with tokens"),
        (
            {"background_prompt": [[torch.ones(1, 2, CONTEXT + 1), {}]]},
            f"The background prompt has tokens of {CONTEXT + 1} channels but this model's prompts have {CONTEXT}; enc",
        ),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str, model: Any) -> None:
    with pytest.raises(ValueError, match=message):
        routed(model, (subject(),), **values)


def test_an_image_prompt_of_another_model(model: Any) -> None:
    with pytest.raises(ValueError, match="The image prompt of subject 2 has tokens of 8 channels but this model's"):
        routed(model, (subject(), subject(prompt=TokenPrompt(torch.ones(1, 2, 8)))))


@pytest.mark.parametrize("values", [{"strength": math.nan}, {"eta": -1.0}, {"start_percent": 2.0}])
def test_bad_shares(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give a number from 0 to"):
        SubjectShareNode.execute((subject(),), **values)


def test_what_two_windows_have_in_common() -> None:
    assert Window(0.2, 0.8) & Window(0.5, 1.0) == Window(0.5, 0.8)
    assert (Window(0.0, 0.3) & Window(0.5, 1.0)).empty
