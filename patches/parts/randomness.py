"""The random numbers of what runs beside a generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Keeps a pass from the random numbers of the generation. Patches that draw some (ToMe) would else give another
    picture when the pass is not needed, and other features after another picture's draws. Every generator that is
    seeded is given its state back, so that no device is seeded whose generator PyTorch does not give."""
    generators = [torch.default_generator]
    if device.type in ("cuda", "xpu"):
        module = torch.get_device_module(device)
        generators.append(module.default_generators[module.current_device() if device.index is None else device.index])
    states = [each.get_state() for each in generators]
    try:
        for each in generators:
            each.manual_seed(0)
        yield
    finally:
        for each, state in zip(generators, states, strict=True):
            each.set_state(state)
