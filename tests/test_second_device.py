"""Every mechanism on a device that is not the CPU, as far as a machine without one can show it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.model_management
import pytest
import torch
from subject_patches.nodes.attention_inspector import AttentionInspectorNode, RecordAttentionNode
from subject_patches.tests.mechanisms import Mechanism, over_mechanisms
from subject_patches.tests.models import difference, known_prompt, sample, small_model
from subject_patches.tests.second_device import DEVICE, SecondDevice

RUN: dict[str, Any] = {"batch": 2, "steps": 2}


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


@pytest.fixture
def there() -> Iterator[Any]:
    """The same model, whose device is another while the test runs."""
    with SecondDevice():
        model = small_model()
        model.load_device = DEVICE
        yield model
        comfy.model_management.unload_model_and_clones(model)


def test_the_rules_are_those_of_a_device() -> None:
    here = torch.ones(2, 2)
    with SecondDevice():
        moved = here.to(DEVICE)
        assert (moved.device, here.device.type, moved[0].device, (moved + 1).device) == (DEVICE, "cpu", DEVICE, DEVICE)
        assert torch.zeros(2, device=moved.device).device == torch.zeros_like(moved).device == DEVICE
        assert (moved.cpu() + here).device.type == "cpu"
        assert (moved * torch.tensor(2.0)).device == DEVICE
        for mixed in (lambda: here + moved, lambda: here * moved[0, 0], lambda: torch.cat([here, moved])):
            with pytest.raises(RuntimeError, match="two devices"):
                mixed()
        with pytest.raises(TypeError, match="copy it to the CPU"):
            moved.numpy()
        moved += 1
        assert here.tolist() == [[1.0, 1.0], [1.0, 1.0]]


@over_mechanisms
def test_a_run(mechanism: Mechanism, model: Any, there: Any) -> None:
    """Recorded, so that what looks inside runs there, too."""
    right = sample(mechanism.on(model, strength=0.6), **RUN)
    patched, record = RecordAttentionNode.execute(mechanism.on(there, strength=0.6)).args
    result = sample(patched, **RUN)
    assert difference(result, right) < 1e-4
    assert all(parameter.device == DEVICE for parameter in there.model.diffusion_model.parameters())
    AttentionInspectorNode.execute(record, torch.rand(2, 64, 64, 3), show="all")


@over_mechanisms
def test_an_area(mechanism: Mechanism, model: Any, there: Any) -> None:
    positive = known_prompt(area=(4, 6, 2, 1), strength=1.0)
    assert sample(mechanism.on(there), **RUN, positive=positive).isfinite().all()
