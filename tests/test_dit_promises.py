"""What every node promises, for small transformers: two families with every mechanism, the others with one of each
kind. One test has what a run of each gives, since a model and its plain picture serve all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from subject_patches.patches.families import attention_sites
from subject_patches.tests.dit_models import PATCHED, dit_model
from subject_patches.tests.mechanisms import FLUX_MECHANISMS, MECHANISMS, Mechanism
from subject_patches.tests.models import difference, sample, subject_for
from subject_patches.tests.peers import splitting
from torch import Tensor

ROUNDING = 2e-5
# With a model that is told the block, with one that is not, whose picture attends to itself besides, and with one whose
# picture attends to the prompt apart.
EVERY = ("FLUX.1", "SD 3.5", "Wan")
KINDS = (
    "recycled self-attention in a region",
    "soft layout bias",
    "two references routed by maps",
    "dual branch",
)
# What U-Nets alone can do, but for image prompts where a picture attends to the prompt apart.
NOT_HERE = {
    "a routed image prompt": "image prompt",
    "an adapter's image prompt": "image prompt",
    "two routed references": "cross_attention",
    "semantic injection": "scales of a U-Net",
}
Family = tuple[Any, Tensor]


PAIRS = [(name, each) for name in PATCHED for each in MECHANISMS if name in EVERY or each.name in KINDS]
PAIRS += [("FLUX.1", each) for each in FLUX_MECHANISMS]


@pytest.fixture(scope="module")
def family(request: Any) -> Family:
    model = dit_model(request.param)
    return model, sample(model, batch=2, size=(7, 9))


@pytest.mark.parametrize(
    ("family", "mechanism"), PAIRS, indirect=["family"], ids=[f"{name}, {each.name}" for name, each in PAIRS]
)
def test_what_a_mechanism_promises(mechanism: Mechanism, family: Family) -> None:
    model, plain = family
    given = {"batch": 2, "size": (7, 9)}
    apart = any(site.kind == "cross" for site in attention_sites(model))
    if mechanism.name in NOT_HERE and not (apart and mechanism.name == "a routed image prompt"):
        with pytest.raises(ValueError, match=NOT_HERE[mechanism.name]):
            mechanism.on(model)
        return
    # 1. Strength 0 changes no bit.
    assert torch.equal(sample(mechanism.off(model, "strength 0"), **given), plain)
    subjects = (subject_for(model),)
    patched = mechanism.on(model, subjects, size=(7, 9))
    both = sample(patched, **given)
    assert both.isfinite().all()
    assert difference(both, plain) > 1e-3
    # 3. and 7. The first of a batch equals it alone, whose references' features are known by now.
    assert difference(sample(patched, size=(7, 9)), both[:1]) < ROUNDING
    # 4. What is batched together or apart gives the same.
    apart = patched.clone()
    apart.set_model_unet_function_wrapper(splitting)
    assert difference(sample(apart, **given), both) < ROUNDING
    # 2. The given model is as it was.
    assert torch.equal(sample(model, **given), plain)
