"""What every node promises, for small transformers: two families with every mechanism, the others with one of each
kind. One test has what a run of each gives, since a model and its plain picture serve all of them."""

from __future__ import annotations

import itertools
from functools import reduce
from typing import Any

import comfy.model_management
import pytest
import torch
from subject_patches.patches.families import attention_sites
from subject_patches.tests.shared.dit_models import PATCHED, description_of, dit_model
from subject_patches.tests.shared.left_behind import interrupt, left_of_sessions, state_of
from subject_patches.tests.shared.mechanisms import FLUX_MECHANISMS, IDLE, MECHANISMS, OF_EACH_KIND, Mechanism
from subject_patches.tests.shared.models import difference, prompt, sample, second_context, subject_for
from subject_patches.tests.shared.partly_loaded import no_room
from subject_patches.tests.shared.peers import splitting
from torch import Tensor

ROUNDING = 2e-5
# With a model that is told the block, with one that is not, whose picture attends to itself besides, and with one whose
# picture attends to the prompt apart.
EVERY = ("FLUX.1", "SD 3.5", "Wan")
# What U-Nets alone can do, but for image prompts where a picture attends to the prompt apart.
NOT_HERE = {
    "a routed image prompt": "image prompt",
    "an adapter's image prompt": "image prompt",
    "two routed references": "cross_attention",
    "semantic injection": "scales of a U-Net",
    "an encoded subject": "Encode Subjects",
    "an encoded subject in its places": "Encode Subjects",
    "encoded subjects by a learned router": "Encode Subjects",
}
Family = tuple[Any, Tensor]


PAIRS = [(name, each) for name in PATCHED for each in MECHANISMS if name in EVERY or each in OF_EACH_KIND]
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
    # 3. and 7. Each of a batch equals it alone, whose references' features are known by now; the last also where they
    # are not.
    for row, who in enumerate((subjects, (subject_for(model),))):
        alone = sample(mechanism.on(model, who, size=(7, 9)), size=(7, 9), seed=5 + row)
        assert difference(alone, both[row : row + 1]) < ROUNDING
    # 4. What is batched together or apart gives the same.
    apart = patched.clone()
    apart.set_model_unet_function_wrapper(splitting)
    assert difference(sample(apart, **given), both) < ROUNDING
    # 2. The given model is as it was.
    assert torch.equal(sample(model, **given), plain)


def together(model: Any) -> Any:
    """The model with one of each kind, one upon the other, and subjects of its own."""
    subjects = (subject_for(model),)
    return reduce(lambda below, mechanism: mechanism.on(below, subjects), OF_EACH_KIND, model)


@pytest.mark.parametrize("name", PATCHED)
def test_what_several_promise_together(name: str) -> None:
    model = dit_model(name)
    plain, before = sample(model), state_of(model)
    # 1. Whatever the reason why there is nothing to do.
    reasons = itertools.cycle(IDLE)
    idle = reduce(lambda below, mechanism: mechanism.off(below, next(reasons)), OF_EACH_KIND, model)
    assert torch.equal(sample(idle), plain)
    patched = together(model)
    whole = sample(patched)
    assert whole.isfinite().all()
    # 8. Each does something beside the others.
    for left in range(len(OF_EACH_KIND) if name in EVERY else 0):
        others = [mechanism for number, mechanism in enumerate(OF_EACH_KIND) if number != left]
        less = reduce(lambda below, mechanism: mechanism.on(below), others, model)
        assert difference(sample(less), whole) > 1e-4, OF_EACH_KIND[left].name
    assert torch.equal(sample(OF_EACH_KIND[1].off(patched, "strength 0")), whole)
    # 2. and 7. The run after one that was interrupted, whose cache may hold half of a pass.
    ended = together(model)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(ended, steps=3, callback=interrupt)
    assert left_of_sessions() == []
    assert torch.equal(sample(ended, steps=3), sample(patched, steps=3))
    assert state_of(model) == before
    # 3. and 4. Prompts that cannot share a batch; HiDream's are in two parts.
    longer = {"negative": prompt(2, 35, **second_context(model, 2))}
    both = sample(patched, batch=2, **longer)
    for row in (0, 1):
        assert difference(sample(patched, **longer, seed=5 + row), both[row : row + 1]) < ROUNDING
    # 9. Offloaded, and partly loaded.
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(patched), whole)
    seen: list[bool] = []
    with no_room():
        parts = sample(patched, callback=lambda *_: seen.append(patched.model.model_lowvram))
    assert seen == [True, True]
    assert difference(parts, whole) < ROUNDING
    assert torch.equal(sample(model), plain)
    # 5. Any width and height; the others run at 7 x 9.
    for size in ((5, 12), (16, 3), (1, 6)):
        given = {"size": size, "steps": 1}
        plain, whole = sample(model, **given), sample(patched, **given)
        assert whole.shape == plain.shape
        assert whole.isfinite().all()
        assert difference(whole, plain) > 1e-3
        assert torch.equal(sample(idle, **given), plain)


# In which the host runs a family's models.
HALVES = [
    (name, dtype)
    for name in PATCHED
    for dtype in description_of(name).supported_inference_dtypes
    if dtype != torch.float32
]


@pytest.mark.parametrize(("name", "dtype"), HALVES)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Patched, it costs no more than it costs the model by itself, whose random weights make much of it."""
    rounded, exact = dit_model(name, dtype=dtype), dit_model(name)
    exact.model.diffusion_model.load_state_dict(rounded.model.diffusion_model.state_dict())
    cost = (sample(rounded, steps=1) - sample(exact, steps=1)).abs().mean()
    result, right = sample(together(rounded), steps=1), sample(together(exact), steps=1)
    assert result.isfinite().all()
    assert difference(result, sample(rounded, steps=1)) > 1e-3
    assert (result - right).abs().mean() < 1.5 * cost
