"""Promise 9: precisions and offloading. Other families are tests/families/test_families.py."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import pytest
import torch
from subject_patches.tests.shared.mechanisms import Mechanism, over_mechanisms
from subject_patches.tests.shared.models import difference, sample, small_model
from subject_patches.tests.shared.partly_loaded import no_room, with_lora_on_keys
from torch import Tensor

ROUNDING = 2e-5
PRECISIONS = {
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "fp16 in fp32": (torch.float16, torch.float32),
    "fp8 in fp32": (torch.float8_e4m3fn, torch.float32),
}


@pytest.fixture(scope="module", params=PRECISIONS)
def rounded_and_exact(request: Any) -> tuple[Any, Tensor, Any, Tensor]:
    """A model of a precision and its picture, and the same weights in float32 and theirs."""
    dtype, compute = PRECISIONS[request.param]
    rounded, exact = small_model(dtype=dtype, compute=compute), small_model()
    exact.model.diffusion_model.load_state_dict(rounded.model.diffusion_model.state_dict())
    return rounded, sample(rounded), exact, sample(exact)


@over_mechanisms
def test_precisions(mechanism: Mechanism, rounded_and_exact: tuple[Any, Tensor, Any, Tensor]) -> None:
    rounded, without, exact, exact_without = rounded_and_exact
    result = sample(mechanism.on(rounded))
    assert result.isfinite().all()
    assert difference(result, without) > 0.01
    assert torch.equal(sample(mechanism.off(rounded, "strength 0")), without)
    # What the precision costs must be small beside what the mechanism does.
    right = sample(mechanism.on(exact))
    if rounded.model.get_dtype_inference() == torch.float32:
        # The same weights and the same arithmetic.
        assert difference(result, right) < 1e-4
    assert (result - right).abs().mean() < 0.3 * (right - exact_without).abs().mean()


@over_mechanisms
def test_offloaded_and_partly_loaded(mechanism: Mechanism) -> None:
    seen: list[bool] = []
    patched = mechanism.on(with_lora_on_keys(small_model()))
    whole = sample(patched)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(patched), whole)
    with no_room():
        parts = sample(patched, callback=lambda *_: seen.append(patched.model.model_lowvram))
    assert seen == [True, True]
    assert difference(parts, whole) < ROUNDING
