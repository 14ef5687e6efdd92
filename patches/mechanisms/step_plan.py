"""Which step of a sampler each call of the model belongs to.

Samplers call the model once a step or several times, some at noise levels of later steps, and tell their caller of a
step only after its first call. So a sampler is rehearsed with a model that does nothing, and what it did is read here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Call(NamedTuple):
    """The sampler called the model at a noise level."""

    sigma: float


class Told(NamedTuple):
    """The sampler told its caller of a step."""

    step: int


def steps_of_calls(events: Sequence[Call | Told], sigmas: Sequence[float]) -> tuple[int, ...] | None:
    """The step of each call, counted from 0, for a sampler that goes down `sigmas` step by step.

    A step begins with the last call before the sampler tells of it for the first time. None where the sampler told of
    other steps than these, or began one at another noise level: it chooses steps of its own."""
    begins: dict[int, int] = {}
    levels: list[float] = []
    for event in events:
        if isinstance(event, Call):
            levels.append(event.sigma)
        else:
            begins.setdefault(event.step, len(levels) - 1)
    count = len(sigmas) - 1
    starts = [begins.get(step, -1) for step in range(count)]
    if len(begins) != count or any(later <= earlier for earlier, later in zip([-1, *starts], starts, strict=False)):
        return None
    # Noise that is added before a step (s_churn) lifts its level.
    if any(levels[start] < sigmas[step] * (1 - 1e-4) for step, start in enumerate(starts)):
        return None
    return tuple(sum(start <= call for start in starts[1:]) for call in range(len(levels)))


def step_at(sigma: float, sigmas: Sequence[float]) -> int:
    """The step that covers a noise level, from its own sigma down to just above the next one's."""
    below = sum(not math.isclose(level, sigma, rel_tol=1e-5) and level > sigma for level in sigmas)
    exact = any(math.isclose(level, sigma, rel_tol=1e-5) for level in sigmas)
    return max(below if exact else below - 1, 0)


@dataclass
class StepPlan:
    """Says for each call of the model in turn to which step it belongs; by its noise level where `steps` is None."""

    sigmas: tuple[float, ...]
    steps: tuple[int, ...] | None
    calls: int = 0

    def next(self, sigma: float) -> int:
        """The step of the next call, which is at this noise level."""
        number, self.calls = self.calls, self.calls + 1
        if self.steps is None or number >= len(self.steps):
            return step_at(sigma, self.sigmas)
        return self.steps[number]
