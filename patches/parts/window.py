"""The part of a run's schedule in which an edit acts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

# A noise level this near the model's highest, as a share of it, is the highest.
_NEAR = 1e-4
_HALVINGS = 48


def percent_of(sigma: float, percent_to_sigma: Callable[[float], float]) -> float:
    """Where in the model's schedule a noise level lies, 0 to 1: the inverse of the host's `percent_to_sigma`, which
    falls. 0 at the model's highest level and above it."""
    low, high = 0.0, 1.0
    if sigma >= float(percent_to_sigma(2.0**-_HALVINGS)) * (1 - _NEAR):
        return low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if float(percent_to_sigma(middle)) >= sigma else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Schedule:
    """A run's own schedule, of which windows are shares: from `begins`, in the host's sense of percent, to no noise.
    The papers' "first steps" are so those of the run, also where it begins at an image. `percent_to_sigma` is the
    model's."""

    begins: float
    percent_to_sigma: Callable[[float], float]

    @classmethod
    def of_run(
        cls,
        highest: float,
        adds_noise: bool,
        percent_to_sigma: Callable[[float], float],
        origin: float | None = None,
    ) -> Schedule:
        """The schedule of a run from the noise level `highest` on.

        A run that adds noise begins a picture, so its schedule begins with it. One that adds none goes on with the
        picture of another run (the second half of a split one): its schedule began at `origin`, or where that is not
        known at the model's highest level. A run that ends early is taken for the first part of one to the end."""
        known = highest if adds_noise else origin
        return cls(0.0 if known is None else percent_of(max(known, highest), percent_to_sigma), percent_to_sigma)

    def sigma(self, share: float) -> float:
        """The noise level at a share of the schedule; without bound at 0, because some samplers go above their first
        level."""
        if share <= 0:
            return math.inf
        return float(self.percent_to_sigma(1.0 if share >= 1 else self.begins + share * (1 - self.begins)))


@dataclass(frozen=True)
class Levels:
    """The noise levels of a run's steps, falling, the last of them where its last step leads (n + 1); and whether it
    begins with noise of its own."""

    sigmas: tuple[float, ...] = (0.0, 0.0)
    adds_noise: bool = True
    percent_to_sigma: Callable[[float], float] = float
    _schedules: dict[float | None, Schedule] = field(default_factory=dict, repr=False, compare=False)

    def schedule(self, origin: float | None = None) -> Schedule:
        """The run's schedule; see `Schedule.of_run`."""
        if origin not in self._schedules:
            self._schedules[origin] = Schedule.of_run(max(self.sigmas), self.adds_noise, self.percent_to_sigma, origin)
        return self._schedules[origin]

    def looked_at(self, sigma: float, every: int) -> float:
        """The level at which something is looked at that is looked at anew every so many steps. Between two levels of
        the run a sampler is in the step of the higher one."""
        if every == 1:
            return sigma
        begun = [step for step, level in enumerate(self.sigmas[:-1]) if level >= sigma * (1 - _NEAR)]
        return self.sigmas[max(begun, default=0) // every * every]

    def lie_in(self, window: Window, sigma: float) -> bool:
        """Whether a noise level of the run lies in a window of it."""
        return window.contains(sigma, self.schedule(window.origin).sigma)

    def none_in(self, window: Window) -> str:
        """What to say to the person at the graph where the run took no step in a window."""
        of_all = "" if self.adds_noise else " of the whole schedule (this run goes on with another's picture)"
        start, end, steps = window.start_percent, window.end_percent, len(self.sigmas) - 1
        return (
            f"of this run's {steps} steps, from sigma {self.sigmas[0]:.4g} on, its model took none in its window, "
            f"{start:g} to {end:g}{of_all}. Widen the window, or take more steps."
        )


@dataclass(frozen=True)
class Window:
    """From `start_percent` to `end_percent` of a run's schedule, both 0 to 1. `origin` is the noise level at which that
    schedule began, for runs that go on with another's picture; None is not known.

    Raises ValueError when a bound is no number from 0 to 1 or the start lies after the end."""

    start_percent: float = 0.0
    end_percent: float = 1.0
    origin: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("start_percent", self.start_percent), ("end_percent", self.end_percent)):
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise ValueError(f"The {name} is {value}; give a number from 0 to 1.")
        if self.start_percent > self.end_percent:
            raise ValueError(
                f"The window starts at {self.start_percent}, after its end at {self.end_percent}; swap the two."
            )

    def __and__(self, other: Window) -> Window:
        """What both windows have in common; empty, and then of no meaning where it lies, if there is nothing."""
        start, end = max(self.start_percent, other.start_percent), min(self.end_percent, other.end_percent)
        return Window(start, max(start, end), self.origin if other.origin is None else other.origin)

    def __or__(self, other: Window) -> Window:
        """The least window that holds both, and so what lies between them."""
        start, end = min(self.start_percent, other.start_percent), max(self.end_percent, other.end_percent)
        return Window(start, end, self.origin if other.origin is None else other.origin)

    @property
    def empty(self) -> bool:
        return self.start_percent == self.end_percent

    def contains(self, sigma: float, sigma_at: Callable[[float], float]) -> bool:
        """Whether a noise level lies in the window; `sigma_at` gives the level at a share of the schedule."""
        if self.empty:
            return False
        return sigma_at(self.end_percent) <= sigma <= sigma_at(self.start_percent)
