"""What SDXL is told of a picture's size, in the passes of references, paths and branches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.supported_models
import node_helpers
import pytest
import torch
from hosting.random_models import SMALL, model_of
from subject_patches.nodes.subject import SubjectNode
from subject_patches.tests.shared.models import (
    POOLED,
    auxiliary_prompt,
    integrated,
    known_prompt,
    mask_router,
    prompt,
    randn,
    recycled,
    reference,
    routed,
    sample,
    subject,
    swapped,
    through,
    trajectory,
)
from subject_patches.tests.shared.small_vaes import small_vae
from torch import Tensor

# What CLIPTextEncodeSDXL writes into a prompt.
SIZES = {"width": 4096, "height": 2048, "crop_w": 8, "crop_h": 16, "target_width": 1024, "target_height": 768}
SIZE = (10, 12)


@pytest.fixture(scope="module")
def model() -> Any:
    config = {**SMALL, "model_channels": 64, "use_linear_in_transformer": True, "num_classes": "sequential"}
    return model_of(comfy.supported_models.SDXL, {**config, "adm_in_channels": POOLED + 6 * 256})


def told(model: Any, **values: Any) -> Tensor:
    """The numbers of a picture's size as the model is told them, behind the pooled output."""
    given = {"device": "cpu", "pooled_output": torch.zeros(1, POOLED), **values}
    return model.model.encode_adm(**given)[0, POOLED:]


def noting(model: Any, seen: dict[tuple[int, int], list[Tensor]]) -> Any:
    """A clone that writes down what each pass was told, by the size of its latents."""

    def note(apply: Callable[..., Tensor], x: Tensor, sigma: Tensor, **values: Any) -> Tensor:
        seen.setdefault(tuple(x.shape[-2:]), []).extend(values["y"][:, POOLED:])
        return apply(x, sigma, **values)

    return through(model, note)


def sized(given: Any) -> Any:
    return node_helpers.conditioning_set_values(given, SIZES)


@pytest.mark.parametrize("explicit", [False, True], ids=["sizes of the latents", "sizes in the prompt"])
@pytest.mark.parametrize("mechanism", ["recycled", "routed"])
def test_a_reference_is_told_its_own_true_size(mechanism: str, explicit: bool, model: Any) -> None:
    """Not the 48 x 64 pixels that it was encoded at, and not what the generation's prompt says of the generation."""
    who = subject(replace(reference(), pixels=(1500, 1200)))
    seen: dict[tuple[int, int], list[Tensor]] = {}
    noted = noting(model, seen)
    patched = recycled(noted, (who,)) if mechanism == "recycled" else routed(noted, (who,), mask_router(1))
    prompts = {"positive": sized(known_prompt()), "negative": sized(prompt(2))} if explicit else {}
    sample(patched, size=SIZE, **prompts)
    assert seen[(6, 8)]
    for numbers in seen[(6, 8)]:
        torch.testing.assert_close(numbers, told(model, width=1200, height=1500))
    for numbers in seen[SIZE]:
        own = SIZES if explicit else {"width": 96, "height": 80}
        torch.testing.assert_close(numbers, told(model, **own))


def test_a_prompt_of_the_references_own_may_say_its_size(model: Any) -> None:
    seen: dict[tuple[int, int], list[Tensor]] = {}
    given = node_helpers.conditioning_set_values(prompt(7), {**SIZES, "width": 640})
    sample(recycled(noting(model, seen), reference_conditioning=given), size=SIZE, positive=sized(known_prompt()))
    for numbers in seen[(6, 8)]:
        torch.testing.assert_close(numbers, told(model, **{**SIZES, "width": 640}))


def test_a_path_of_another_size_is_told_its_own(model: Any) -> None:
    seen: dict[tuple[int, int], list[Tensor]] = {}
    path = trajectory(randn(1, 4, 6, 8, seed=4), family="SDXL")
    same = trajectory(randn(1, 4, *SIZE, seed=5), family="SDXL")
    patched = swapped(noting(model, seen), same, path, lambda2=0.5, apply_to="cond only")
    sample(patched, size=SIZE, positive=sized(known_prompt()), negative=sized(prompt(2)))
    for numbers in seen[(6, 8)]:
        torch.testing.assert_close(numbers, told(model, width=64, height=48))
    # A layout is of the generation's own picture.
    for numbers in seen[SIZE]:
        torch.testing.assert_close(numbers, told(model, **SIZES))


def test_a_branch_is_told_what_the_generation_is(model: Any) -> None:
    seen: dict[tuple[int, int], list[Tensor]] = {}
    patched = integrated(noting(model, seen), auxiliary=auxiliary_prompt())
    sample(patched, size=SIZE, positive=sized(known_prompt()), negative=sized(prompt(2)))
    assert len(seen[SIZE]) > 4
    for numbers in seen[SIZE]:
        torch.testing.assert_close(numbers, told(model, **SIZES))


def test_the_subject_node_remembers_the_size_before_it_resized() -> None:
    image, mask = torch.rand(1, 300, 400, 3), torch.zeros(1, 300, 400)
    mask[:, 50:150, 100:300] = 1
    given = {"image": [image], "vae": [small_vae()], "size": [64], "margin": [0.0]}
    ((whole,),) = (made.references for made in SubjectNode.execute(**given).args[0])
    ((cropped,),) = (made.references for made in SubjectNode.execute(**given, mask=[mask]).args[0])
    assert whole.pixels == (300, 400)
    assert cropped.pixels == (100, 200)
