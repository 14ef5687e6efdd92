"""Image prompts of Eq. 5, made of a picture by the host's own nodes and as adapters make them."""

from __future__ import annotations

from typing import Any

import comfy.sd
import pytest
import torch
from comfy.t2i_adapter.adapter import StyleAdapter
from subject_patches.nodes.routed_reference import SubjectShareNode
from subject_patches.tests.shared.models import (
    CONTEXT,
    Conditioning,
    difference,
    generator,
    prompt,
    routed,
    sample,
    subject,
)
from subject_patches.tests.shared.small_vision import PROJECTED, WIDTH, clip_vision, random_weights
from torch import Tensor

import nodes as host_nodes

TOKENS = 4


@pytest.fixture(scope="module")
def vision() -> Any:
    return clip_vision()


def seen(vision: Any, picture: int) -> Any:
    """CLIP Vision Encode of a random picture."""
    image = torch.rand(1, 64, 56, 3, generator=generator(picture))
    return host_nodes.CLIPVisionEncode().encode(vision, image, "center")[0]


def style_model() -> Any:
    return comfy.sd.StyleModel(random_weights(StyleAdapter(WIDTH, CONTEXT, 2, 1, TOKENS), 2))


def styled(vision: Any, picture: int) -> Conditioning:
    """Apply Style Model to an encoded text: the picture's tokens behind it."""
    apply = host_nodes.StyleModelApply().apply_stylemodel
    with torch.inference_mode():
        return apply(prompt(3), style_model(), seen(vision, picture), 1.0, "multiply")[0]


def adapted(vision: Any, picture: int) -> Conditioning:
    """As IPAdapter projects a picture's embedding: a linear layer to some tokens, each normalised."""
    project = random_weights(torch.nn.Linear(PROJECTED, TOKENS * CONTEXT), 4)
    with torch.inference_mode():
        tokens = project(seen(vision, picture).image_embeds).view(1, TOKENS, CONTEXT)
        return [[torch.nn.functional.layer_norm(tokens, (CONTEXT,)), {}]]


def shown(model: Any, image_prompt: Conditioning, last: int = 0, eta: float = 1.0) -> Tensor:
    """A picture in whose upper left the image prompt acts alone, without references."""
    mine = SubjectShareNode.execute((subject(),), 0.0, image_prompt=image_prompt, last_tokens=last).args[0]
    other = subject(seed=1, phrase="scene", strength=0.0)
    return sample(routed(model, (*mine, other), eta=eta))


@pytest.mark.parametrize("make", [styled, adapted])
def test_a_picture_is_an_image_prompt(make: Any, model: Any, vision: Any) -> None:
    one, other = (shown(model, make(vision, picture), TOKENS) for picture in (5, 6))
    plain = sample(model)
    assert difference(one, plain) > 1e-3
    assert difference(one, other) > 1e-4
    assert torch.equal(shown(model, make(vision, 5), TOKENS, eta=0.0), plain)


def test_the_style_models_tokens_alone(model: Any, vision: Any) -> None:
    image_prompt = styled(vision, 5)
    text = prompt(3)[0][0].shape[1]
    assert image_prompt[0][0].shape == (1, text + TOKENS, CONTEXT)
    with torch.inference_mode():
        alone = [[style_model().get_cond(seen(vision, 5)), {}]]
    torch.testing.assert_close(shown(model, image_prompt, TOKENS), shown(model, alone), rtol=0, atol=1e-5)
    # With the text's tokens before them it is something else.
    assert difference(shown(model, image_prompt), shown(model, alone)) > 1e-4


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (12, "last_tokens is 12 but the image prompt has 11; 0 takes all of them"),
        (-1, "The last_tokens are -1; give a number from 0 to 4096"),
    ],
)
def test_tokens_that_are_not_there(last: int, message: str, vision: Any) -> None:
    with pytest.raises(ValueError, match=message):
        SubjectShareNode.execute((subject(),), image_prompt=styled(vision, 5), last_tokens=last)
