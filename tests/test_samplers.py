"""Promise 6: every sampler and scheduler of the host."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import pytest
import torch
from subject_patches.tests.mechanisms import MECHANISMS
from subject_patches.tests.models import difference, sample, small_model

MECHANISM = MECHANISMS[0]


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


def check(model: Any, **run: Any) -> None:
    plain = sample(model, **run)
    patched = MECHANISM.on(model)
    result = sample(patched, **run)
    assert result.isfinite().all()
    assert difference(result, plain) > 0.003
    # The second run has its features from the cache.
    assert torch.equal(sample(patched, **run), result)
    assert torch.equal(sample(MECHANISM.off(model, "strength 0"), **run), plain)


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_sampler(sampler: str, model: Any) -> None:
    check(model, steps=8, sampler=sampler)


@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_scheduler(scheduler: str, model: Any) -> None:
    check(model, steps=4, scheduler=scheduler)
