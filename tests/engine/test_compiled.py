"""A model that the host's node compiles: the same picture as without, run after run, nothing left for other runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.supported_models
import pytest
import torch
from comfy_extras.nodes_torch_compile import TorchCompileModel
from hosting.random_models import TINY, model_of
from subject_patches.tests.shared.mechanisms import MECHANISMS
from subject_patches.tests.shared.models import difference, sample, subject

CHOSEN = ("recycled self-attention", "layout bias", "multi-source swap", "dual branch")
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of(comfy.supported_models.SD15, TINY)


def windowed(target: Any) -> Any:
    return MECHANISMS[0].patch(target, (subject(),), 1.0, (0.3, 0.7))


@pytest.fixture(scope="module")
def compiled(model: Any) -> Iterator[Any]:
    """By the host's node, with the backend that runs what was traced as it is. It is traced, once for all tests because
    that takes long, in a run with steps that are patched and steps that are not."""
    torch._dynamo.reset()
    both = TorchCompileModel.execute(model, "eager").args[0]
    assert difference(sample(windowed(both), steps=4), sample(windowed(model), steps=4)) < ROUNDING
    yield both
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CHOSEN)
def test_a_compiled_model_gives_the_same_picture(name: str, model: Any, compiled: Any) -> None:
    (mechanism,) = (m for m in MECHANISMS if m.name == name)
    exact, plain = sample(mechanism.on(model)), sample(model)
    assert difference(exact, plain) > 0.003
    for patched in (mechanism.on(compiled), TorchCompileModel.execute(mechanism.on(model), "eager").args[0]):
        for _ in range(2):
            assert difference(sample(patched), exact) < ROUNDING
            assert difference(sample(compiled), plain) < ROUNDING
    assert torch.equal(sample(model), plain)
