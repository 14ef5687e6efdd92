"""Dual-Branch Integration: what it refuses, and numbers at the ends of their ranges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from subject_patches.tests.shared.models import (
    difference,
    integrated,
    prompt,
    sample,
)

SIZE = (7, 10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"injection_strength": float("nan")}, r"The injection_strength is nan; give a number from -1e\+06 to 1e\+06"),
        ({"strength": 1.5}, "The strength is 1.5; give a number from 0 to 1"),
        ({"gain": -1.0}, "The gain is -1.0; give a number from 0 to"),
        ({"sharpness": float("inf")}, "The sharpness is inf"),
        ({"end_percent": 1.2}, "end_percent is 1.2; give a number from 0 to 1"),
        ({"gain_mode": "none"}, "The gain_mode is 'none'; choose one of fixed, by resolution"),
        ({"noise": "none"}, "The noise is 'none'; choose one of own, the concept's"),
        ({"guidance": "none"}, "The guidance is 'none'; choose one of shared, own"),
        ({"sites": "named", "named_sites": "output.99"}, "'output.99' names no cross-attention"),
        ({"concept": prompt(1)}, "The concept conditioning does not say .* the concept output of Dual-Branch Prompts"),
        ({"auxiliary": prompt(1)}, "The auxiliary conditioning does not say .* the auxiliary output of"),
    ],
)
def test_what_it_refuses(values: dict[str, Any], message: str, model: Any) -> None:
    with pytest.raises(ValueError, match=message):
        integrated(model, **values)


@pytest.mark.parametrize(("injection", "same"), [(-1e6, -1e5), (1e6, 1e5)])
def test_lambda_far_beyond_its_usual_range(injection: float, same: float, model: Any) -> None:
    results = [sample(integrated(model, injection_strength=each), size=SIZE) for each in (injection, same)]
    assert results[0].isfinite().all()
    assert torch.equal(*results)


def test_lambda_0_mixes(model: Any) -> None:
    assert difference(sample(integrated(model, injection_strength=0.0, gain=1.0)), sample(model)) > 0.01


def test_guidance_of_its_own_without_a_negative_prompt_says_so(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    own, shared = (sample(integrated(model, guidance=choice), cfg=1.0) for choice in ("own", "shared"))
    assert torch.equal(own, shared)
    assert [r.message for r in caplog.records if "guidance is 'own', but no negative prompt" in r.message]
    assert len([r for r in caplog.records if "guidance is 'own'" in r.message]) == 1
