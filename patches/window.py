"""The part of the schedule in which an edit acts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """From `start_percent` to `end_percent` of the schedule, both 0 to 1, in the host's sense of percent.

    Raises ValueError when a bound is no number from 0 to 1 or the start lies after the end."""

    start_percent: float = 0.0
    end_percent: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("start_percent", self.start_percent), ("end_percent", self.end_percent)):
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise ValueError(f"{name} is {value}; give a number from 0 to 1.")
        if self.start_percent > self.end_percent:
            raise ValueError(
                f"The window starts at {self.start_percent}, after its end at {self.end_percent}; swap the two."
            )

    def __and__(self, other: Window) -> Window:
        """What both windows have in common; empty, and then of no meaning where it lies, if there is nothing."""
        start, end = max(self.start_percent, other.start_percent), min(self.end_percent, other.end_percent)
        return Window(start, max(start, end))

    @property
    def empty(self) -> bool:
        return self.start_percent == self.end_percent

    def contains(self, sigma: float, percent_to_sigma: Callable[[float], float]) -> bool:
        """Whether a noise level lies in the window; `percent_to_sigma` is the model's own."""
        if self.empty:
            return False
        return percent_to_sigma(self.end_percent) <= sigma <= percent_to_sigma(self.start_percent)
