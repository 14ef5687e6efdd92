"""Promise 5: any width and height that the model takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from subject_patches.tests.shared.mechanisms import Mechanism, over_mechanisms
from subject_patches.tests.shared.models import difference, sample
from torch import Tensor

SIZES = ((13, 21), (5, 30), (9, 9))


@pytest.fixture(scope="module")
def plain_at(model: Any) -> dict[tuple[int, int], Tensor]:
    return {size: sample(model, size=size) for size in SIZES}


@over_mechanisms
@pytest.mark.parametrize("size", SIZES)
def test_any_width_and_height(
    mechanism: Mechanism, size: tuple[int, int], model: Any, plain_at: dict[tuple[int, int], Tensor]
) -> None:
    result = sample(mechanism.on(model, size=size), size=size)
    assert result.shape == (1, 4, *size)
    assert result.isfinite().all()
    assert difference(result, plain_at[size]) > 0.01
    assert torch.equal(sample(mechanism.off(model, "strength 0"), size=size), plain_at[size])
