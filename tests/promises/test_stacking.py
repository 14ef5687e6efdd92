"""Promise 8: nodes of this pack stack in any number. With other packs it is tests/engine/test_composition.py."""

from __future__ import annotations

import itertools
from functools import reduce
from typing import Any

import pytest
import torch
from subject_patches.tests.shared.mechanisms import IDLE, MECHANISMS, Mechanism, over_mechanisms
from subject_patches.tests.shared.models import difference, sample, subject
from torch import Tensor


@pytest.fixture(scope="module")
def alone(model: Any) -> dict[tuple[str, int], Tensor]:
    """What each mechanism samples by itself, with the subject of a seed."""
    return {(m.name, seed): sample(m.on(model, (subject(seed=seed),)), steps=3) for m in MECHANISMS for seed in (1, 2)}


@over_mechanisms
def test_two_nodes_stack(mechanism: Mechanism, model: Any, alone: dict[tuple[str, int], Tensor]) -> None:
    """The mechanism with itself and with others: of two kinds now one is upon the other, now the other upon it."""
    number = MECHANISMS.index(mechanism)
    first = mechanism.on(model, (subject(seed=1),))
    for place, above in enumerate(MECHANISMS):
        if (place < number) == bool((place + number) % 2) and place != number:
            continue
        # A layout's swap takes the first step to itself, and the last of two has hardly any noise: the second of three.
        result = sample(above.on(first, (subject(seed=2),)), steps=3)
        assert difference(result, alone[mechanism.name, 1]) > 0.003, above.name
        assert difference(result, alone[above.name, 2]) > 0.003, above.name
    assert torch.equal(sample(first, steps=3), alone[mechanism.name, 1])


@over_mechanisms
def test_three_of_a_kind_stack(mechanism: Mechanism, model: Any) -> None:
    stacks, results = [model], []
    for seed in (1, 2, 3):
        stacks.append(mechanism.on(stacks[-1], (subject(seed=seed),)))
        results.append(sample(stacks[-1]))
    assert all(difference(one, other) > 0.003 for one, other in itertools.combinations(results, 2))
    assert torch.equal(sample(stacks[2]), results[1])


def test_all_nodes_stack(model: Any, alone: dict[tuple[str, int], Tensor]) -> None:
    stacked = reduce(lambda below, mechanism: mechanism.on(below, (subject(seed=1),)), MECHANISMS, model)
    result = sample(stacked)
    assert result.isfinite().all()
    assert all(difference(result, other) > 0.003 for other in alone.values())
    assert torch.equal(sample(stacked), result)


@over_mechanisms
@pytest.mark.parametrize("how", IDLE)
def test_an_idle_node_on_top_changes_no_bit(mechanism: Mechanism, how: str, model: Any) -> None:
    patched = mechanism.on(model)
    assert torch.equal(sample(mechanism.off(patched, how)), sample(patched))
