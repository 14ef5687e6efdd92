"""Promises 3 and 4: a batch of N equals N singles, and conditionings together or apart give the same result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from subject_patches.tests.shared.mechanisms import Mechanism, over_mechanisms
from subject_patches.tests.shared.models import difference, latent_noise, prompt, sample
from subject_patches.tests.shared.peers import splitting
from torch import Tensor

# For sums taken in another order, as a share of the largest value: a batch of another size, say.
ROUNDING = 2e-5


@over_mechanisms
def test_a_batch_is_its_singles(mechanism: Mechanism, model: Any) -> None:
    size = (7, 10)
    patched = mechanism.on(model, size=size)
    together = sample(patched, batch=3, size=size)
    for row in range(3):
        alone = sample(patched, size=size, seed=5 + row)
        assert difference(together[row : row + 1], alone) < ROUNDING


def test_the_noise_of_a_row_does_not_depend_on_its_batch() -> None:
    assert torch.equal(latent_noise(3, (7, 10), 5)[2:], latent_noise(1, (7, 10), 7))


@over_mechanisms
def test_prompts_that_cannot_share_a_batch(mechanism: Mechanism, model: Any) -> None:
    # The host repeats the shorter prompt, which changes nothing, but no more than four times: five times as long, the
    # same prompt takes a pass of its own.
    (tokens, _), *_ = prompt(2)
    apart = [[tokens.repeat(1, 5, 1), {}]]
    patched = mechanism.on(model)
    calls: list[int] = []
    assert difference(sample(counting(patched, calls), batch=2, negative=apart), sample(patched, batch=2)) < ROUNDING
    assert 2 in calls
    assert 4 not in calls


def counting(model: Any, calls: list[int]) -> Any:
    """A clone whose model calls are counted by their rows, through the host's own function wrapper."""

    def wrapped(apply: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        calls.append(len(arguments["input"]))
        return apply(arguments["input"], arguments["timestep"], **arguments["c"])

    counted = model.clone()
    counted.set_model_unet_function_wrapper(wrapped)
    return counted


@over_mechanisms
def test_a_batch_that_another_pack_takes_apart(mechanism: Mechanism, model: Any) -> None:
    patched = mechanism.on(model)
    apart = patched.clone()
    apart.set_model_unet_function_wrapper(splitting)
    assert difference(sample(apart, batch=2), sample(patched, batch=2)) < ROUNDING
