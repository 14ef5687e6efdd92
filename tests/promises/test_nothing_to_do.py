"""Promise 1: strength 0, an empty window or no subject gives the unpatched result bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.families import attention_sites
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared.look import Look
from subject_patches.tests.shared.mechanisms import IDLE, Mechanism, over_mechanisms
from subject_patches.tests.shared.models import difference, sample, subject
from torch import Tensor


@over_mechanisms
@pytest.mark.parametrize("how", IDLE)
def test_nothing_to_do_changes_no_bit(mechanism: Mechanism, how: str, model: Any, plain: Tensor) -> None:
    assert torch.equal(sample(mechanism.off(model, how)), plain)


@over_mechanisms
def test_at_work_it_changes_the_picture(mechanism: Mechanism, model: Any, plain: Tensor) -> None:
    assert difference(sample(mechanism.on(model)), plain) > 0.01


@over_mechanisms
def test_nothing_is_amended_outside_the_window(mechanism: Mechanism, model: Any) -> None:
    start = 0.3 if mechanism.begins else 0.0
    look = Look(frozenset(attention_sites(model)), Window())
    sample(add_edit(mechanism.patch(model, (subject(),), 1.0, (start, 0.8)), look), steps=8)
    to_sigma = model.model.model_sampling.percent_to_sigma
    inside = {seen.sigma for seen in look.seen if to_sigma(0.8) <= seen.sigma <= to_sigma(start)}
    # Of the layers and steps of a window some may be left out.
    amended = {seen.sigma for seen in look.seen if seen.amended}
    assert len(amended) > 1
    assert amended <= inside < {seen.sigma for seen in look.seen}
    assert {seen.call.chunk.name for seen in look.seen if seen.amended} >= {"positive"}
