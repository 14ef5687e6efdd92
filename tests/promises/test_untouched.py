"""Promise 2: the input MODEL is untouched, also after an interrupt, an exception or the node's removal."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import comfy.model_management
import pytest
import torch
from subject_patches.tests.shared.left_behind import interrupt, left_of_sessions, state_of
from subject_patches.tests.shared.mechanisms import Mechanism, over_mechanisms
from subject_patches.tests.shared.models import sample
from torch import Tensor


@over_mechanisms
def test_the_given_model_is_untouched(mechanism: Mechanism, model: Any, plain: Tensor) -> None:
    before = state_of(model)
    patched = mechanism.on(model)
    sample(patched)
    assert state_of(model) == before
    assert torch.equal(sample(model), plain)


# The host marks the layers of a model that it loads for the first time.
@pytest.mark.usefixtures("plain")
@over_mechanisms
def test_nothing_of_a_run_survives_it(mechanism: Mechanism, model: Any) -> None:
    patched = mechanism.on(model)
    before = state_of(patched)
    sample(patched)
    assert state_of(patched) == before
    assert left_of_sessions() == []


def fail(step: int, *_: Any) -> None:
    if step == 1:
        raise RuntimeError("the preview broke")


@over_mechanisms
@pytest.mark.parametrize(
    ("end", "error"),
    [(interrupt, comfy.model_management.InterruptProcessingException), (fail, RuntimeError)],
    ids=["interrupted", "failed"],
)
def test_the_run_after_an_ended_one(
    mechanism: Mechanism, end: Callable[..., None], error: type[BaseException], model: Any, plain: Tensor
) -> None:
    patched = mechanism.on(model)
    before = state_of(patched)
    whole = sample(patched, steps=4)
    # A subject of its own: the run that is ended starts with an empty cache, and so may leave half of one.
    ended = mechanism.on(model)
    with pytest.raises(error):
        sample(ended, steps=4, callback=end)
    assert left_of_sessions() == []
    assert state_of(patched) == before
    assert torch.equal(sample(model), plain)
    assert torch.equal(sample(ended, steps=4), whole)


def breaking(model: Any, at: int) -> Any:
    """A clone in which the cross-attention that is the `at`-th to run fails, whoever's pass it is of."""
    done = itertools.count(1)

    def fail_once(output: Tensor, _: dict[str, Any]) -> Tensor:
        if next(done) == at:
            raise RuntimeError("out of memory")
        return output

    clone = model.clone()
    clone.set_model_attn2_output_patch(fail_once)
    return clone


@over_mechanisms
@pytest.mark.parametrize("at", [3, 25])
def test_the_run_after_a_pass_that_failed(mechanism: Mechanism, at: int, model: Any, plain: Tensor) -> None:
    broken = breaking(mechanism.on(model), at)
    before = state_of(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(broken, steps=4)
    assert left_of_sessions() == []
    assert state_of(broken) == before
    assert torch.equal(sample(model), plain)
    assert torch.equal(sample(broken, steps=4), sample(mechanism.on(model), steps=4))
